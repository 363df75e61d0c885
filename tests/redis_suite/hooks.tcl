# Sourced at the end of the suite's own procedures: whenever a test's server answers, before the test's client
# connects, ask KFLEX_SUITE_PORT to attach the offload to it. The plain run asks as well (and its servers are
# looked at in the same way), so that both see the same commands.

proc kflex_ask {what srv} {
    set fd [socket 127.0.0.1 $::env(KFLEX_SUITE_PORT)]
    fconfigure $fd -translation binary
    puts $fd "$what [dict get $srv port] [dict get $srv pid]"
    flush $fd
    gets $fd
    close $fd
}

rename reconnect suite_reconnect
proc reconnect {args} {
    set level [lindex $args 0]
    if {[string length $level] == 0 || ![string is integer $level]} {
        set level 0
    }
    kflex_ask attach [lindex $::servers end+$level]
    uplevel 1 [list suite_reconnect {*}$args]
    kflex_warm [dict get [lindex $::servers end+$level] client]
}

# The first request of a connection always goes to Redis: not one of the test's, where a test is to be served.
# (A server may refuse it: a password, or a test that wants that.)
proc kflex_warm {client} {
    if {$::singledb} {
        catch {$client ping}
    }
}

# A server started without a block of code gets no client from the suite: the test connects by itself.
rename start_server suite_start_server
proc start_server {args} {
    set result [uplevel 1 [list suite_start_server {*}$args]]
    if {[llength $args] == 1 && [llength $result] && [dict exists $result pid]} {
        kflex_ask attach $result
    }
    return $result
}

rename kill_server suite_kill_server
proc kill_server {config} {
    suite_kill_server $config
    kflex_ask gone $config
}

# One large reply or unusual command ends the service of a connection for good, and the suite's clients live for a
# whole file. Where tests are to be served each begins with new connections, except for clients that have a state of
# their own. The client objects stay: tests keep them in variables.
rename test suite_test
proc test {name code args} {
    if {$::singledb} {
        foreach srv $::servers {
            catch {kflex_renew [dict get $srv client]}
        }
    }
    uplevel 1 [list suite_test $name $code {*}$args]
}

proc kflex_renew {client} {
    regexp {redisHandle([0-9]+)$} $client -> id
    if {$::redis::fd($id) eq {} || $::redis::deferred($id) || $::redis::readraw($id) || !$::redis::blocking($id)} return
    set plain {* name= * flags=N db=0 sub=0 psub=0 ssub=0 multi=-1 * user=default redir=-1 resp=2*}
    if {![string match $plain [$client client info]]} return
    set fd [socket {*}$::redis::addr($id)]
    fconfigure $fd -translation binary
    puts -nonewline $fd "*1\r\n\$4\r\nPING\r\n"
    flush $fd
    if {[gets $fd] eq "+PONG\r"} {
        close $::redis::fd($id)
        set ::redis::fd($id) $fd
    } else {
        # The old one has logged in.
        close $fd
    }
}
