#!/usr/bin/env bash
# Starts a throwaway SLURM on this machine: up.sh FOLDER [NODES]. Needs root and Debian's packages
# (apt-get install slurm-wlm munge); down.sh FOLDER stops it. Settings that tests change:
#   KILL_WAIT    seconds between SLURM's TERM and its KILL
#   GRACE        seconds that a preempted job gets before it is ended
#   PREEMPT      what happens to a preempted job: REQUEUE or CANCEL
set -euo pipefail
folder=$(realpath -m "${1:?folder}")
nodes=${2:-2}
if [ -e /etc/slurm/slurm.conf ] && [ ! -L /etc/slurm/slurm.conf ]; then
  echo "/etc/slurm/slurm.conf exists, so this machine has its own SLURM: run these tests on another machine" >&2
  exit 1
fi
# Stop a previous throwaway SLURM, which would still use the ports.
[ -L /etc/slurm/slurm.conf ] && "$(dirname "$0")/down.sh" "$(dirname "$(readlink /etc/slurm/slurm.conf)")"
mkdir -p "$folder"/{state,log} /etc/slurm

install -d -o munge -g munge -m 0755 /run/munge
[ -s /etc/munge/munge.key ] || (umask 077; head -c 1024 /dev/urandom > /etc/munge/munge.key; chown munge: /etc/munge/munge.key)
pgrep -x munged > /dev/null || runuser -u munge -- munged
munge -n | unmunge > /dev/null

host=$(hostname -s)
cores=$(nproc)
cat > "$folder/slurm.conf" <<CONF
ClusterName=throwaway
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPort=16817
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdSpoolDir=$folder/spool/%n
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
# Accept more memory than the machine has: jobs ask for a GPU's share of it but use little.
SlurmdParameters=config_overrides
# No cgroups, which a container may lack.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=600
MinJobAge=300
KillWait=${KILL_WAIT:-60}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=${PREEMPT:-REQUEUE}
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17901-$((17900 + nodes))] CPUs=$cores RealMemory=64000 Gres=gpu:test:2
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=${GRACE:-60}
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
# Any two devices will do, but SLURM drains a node whose gres has no devices.
echo "NodeName=node[1-$nodes] Name=gpu Type=test File=/dev/tty[1-2]" > "$folder/gres.conf"
echo "CgroupPlugin=cgroup/v1" > "$folder/cgroup.conf"
# Link the files from SLURM's default path, because the steps of a job lose $SLURM_CONF.
for name in slurm gres cgroup; do ln -sfn "$folder/$name.conf" "/etc/slurm/$name.conf"; done

slurmctld -c
for number in $(seq "$nodes"); do
  mkdir -p "$folder/spool/node$number"
  slurmd -N "node$number"
done
for _ in $(seq 2400); do
  [ "$(sinfo -h -p gpu -t idle -o %D)" = "$nodes" ] && break
  sleep 0.25
done
sinfo -h -p gpu -N -o "%N %t %c cores %m MB %G"
[ "$(sinfo -h -p gpu -t idle -o %D)" = "$nodes" ]
