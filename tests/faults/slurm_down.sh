#!/usr/bin/env bash
# slurm_down.sh DIR: cancel the jobs and end the daemons that slurm_up.sh DIR PORT started.
dir=$(realpath -m "$1")
export SLURM_CONF=$dir/slurm.conf
[ -s "$dir/slurmctld.pid" ] && scancel --user "$(id -un)"
for _ in $(seq 400); do  # KillWait is 30 seconds
    [ -s "$dir/slurmctld.pid" ] && [ -n "$(squeue -h)" ] || break
    sleep 0.1
done
for pid_file in "$dir"/127.0.0.*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    [ -s "$pid_file" ] && kill "$(cat "$pid_file")"
    for _ in $(seq 100); do  # for the file, because a zombie answers kill -0
        [ -e "$pid_file" ] || break
        sleep 0.02
    done
done
