#!/usr/bin/env bash
# Stops the SLURM that up.sh FOLDER started: ends its jobs and daemons and removes its links.
folder=$(realpath -m "${1:?folder}")
[ "$(readlink /etc/slurm/slurm.conf)" = "$folder/slurm.conf" ] || exit 0
timeout 10 scancel --user "$(id -un)"
sleep 1
for file in "$folder"/slurmd-*.pid "$folder"/slurmctld.pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2> /dev/null
  # Wait for its end, because the next SLURM needs the same ports. Without a reaper, a dead process remains a zombie.
  for _ in $(seq 40); do
    grep -qs "^State:\s*[^Z]" "/proc/$pid/status" || break
    sleep 0.25
  done
done
# Kill what remains on nodes that were down when scancel ran.
for folder in /proc/[0-9]*; do
  grep -qsz '^SLURM_CLUSTER_NAME=throwaway$' "$folder/environ" && kill -KILL "${folder#/proc/}"
done
for name in slurm gres cgroup; do rm -f "/etc/slurm/$name.conf"; done
exit 0
