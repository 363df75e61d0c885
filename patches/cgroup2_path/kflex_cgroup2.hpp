// SPDX-License-Identifier: BSD-3-Clause
#ifndef KFLEX_CGROUP2_HPP
#define KFLEX_CGROUP2_HPP

#include <mntent.h>

#include <cstdio>
#include <cstring>
#include <string>

// Where cgroup v2 is mounted first, by the mount table. Without any it is the usual place, so that opening it says
// what is wrong.
inline const char *kflex_cgroup2() {
  static const std::string path = [] {
    std::string found = "/sys/fs/cgroup";
    if (FILE *mounts = setmntent("/proc/self/mounts", "r")) {
      while (const mntent *mount = getmntent(mounts)) {
        if (!std::strcmp(mount->mnt_type, "cgroup2")) {
          found = mount->mnt_dir;
          break;
        }
      }
      endmntent(mounts);
    }
    return found;
  }();
  return path.c_str();
}

#endif
