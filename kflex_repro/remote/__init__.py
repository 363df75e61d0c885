"""The probe commands on another host, over SSH."""
