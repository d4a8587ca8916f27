#!/usr/bin/env bash
# slurm_up.sh DIR PORT: a Slurm of four nodes on this machine, for SLURM_CONF=DIR/slurm.conf
#
# Needs root, slurm-wlm and munge (make test-slurm installs them). DIR is made; the ports PORT to
# PORT + 5 must be free. The nodes' names are loopback addresses, which need no /etc/hosts.
# Jobs in the partition `high` preempt those in `low` at once, and those in `grace` in a minute.
set -eu
dir=$(realpath -m "$1") port=$2
mkdir -p "$dir/state"
head -c 128 /dev/urandom > "$dir/munge.key"
chmod 600 "$dir/munge.key"
cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
FirstJobId=$((port * 10))
CONF
for node in 2 3 4 5; do
    echo "NodeName=127.0.0.$node NodeHostname=$(hostname) NodeAddr=127.0.0.1" \
        "Port=$((port + node - 1)) CPUs=8" >> "$dir/slurm.conf"
done
cat >> "$dir/slurm.conf" <<CONF
PartitionName=low Nodes=127.0.0.[2-5] Default=YES PriorityTier=1
PartitionName=grace Nodes=127.0.0.[2-5] PriorityTier=1 GraceTime=60
PartitionName=high Nodes=127.0.0.[2-5] PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF=$dir/slurm.conf
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
slurmctld
for node in 2 3 4 5; do slurmd -N 127.0.0.$node; done
for _ in $(seq 300); do
    [ "$(sinfo -h -N -p low -o %T | grep -c idle)" = 4 ] && exit 0
    sleep 0.1
done
sinfo -N -l >&2
exit 1
