#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests: munge, controller and one slurmd a node, all on loopback and all
# under one folder. Needs root; installs Debian's packages where they are missing.
#   slurm_up.sh FOLDER PORT      then: export SLURM_CONF=FOLDER/etc/slurm.conf
#   slurm_up.sh --down FOLDER    ends what the folder's pid files name, and nothing else
set -euo pipefail

# The pid in a file, if it still is the daemon of that name which was started for this folder.
ours() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] || return 1
  cat "/proc/$pid/cmdline" "/proc/$pid/environ" 2>/dev/null | tr '\0' '\n' | grep -qF "$3/" && echo "$pid"
}

down() {
  local folder=$1 pid file jobs
  export SLURM_CONF=$folder/etc/slurm.conf
  [ -d "$folder/run" ] || return 0
  if ours "$folder/run/slurmctld.pid" slurmctld "$folder" >/dev/null; then
    jobs=$(timeout 60 squeue -h -o %A | sort -u || true)
    for job in $jobs; do timeout 60 scancel --full --signal=KILL "$job" || true; timeout 60 scancel "$job" || true; done
    for _ in $(seq 40); do [ -z "$(timeout 60 squeue -h || true)" ] && break; sleep 0.2; done
  fi
  # Each takes seconds to end: all are asked first, but for munged, which the others need for it.
  for file in "$folder"/run/slurm*.pid; do
    name=$(basename "$file" .pid)
    pid=$(ours "$file" "${name%%-*}" "$folder") && kill "$pid" 2>/dev/null || true
  done
  for file in "$folder"/run/slurm*.pid "$folder"/run/munged.pid; do
    name=$(basename "$file" .pid); name=${name%%-*}
    pid=$(ours "$file" "$name" "$folder") || continue
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
  done
  # In place, since it may be a mount; and the control groups, empty by now.
  hosts=$(grep -v "# $folder\$" /etc/hosts) && printf '%s\n' "$hosts" >/etc/hosts
  for group in "$folder"/state/d-*; do
    group=/sys/fs/cgroup/freezer/slurm_${group##*/d-}
    [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  rm -rf "$folder"
}

if [ "$1" = --down ]; then down "$2"; exit; fi
folder=$1; port=$2; gpus=8; nodes=("t$port-1" "t$port-2"); names="t$port-[1-2]"
[ "$(id -u)" = 0 ] || { echo "slurm_up: needs root" >&2; exit 3; }

exec 9>/tmp/mambalign-slurm.lock   # one of several test processes installs, the others wait for it
flock 9
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || { echo "slurm_up: no apt-get to install ${missing[*]}" >&2; exit 3; }
  export DEBIAN_FRONTEND=noninteractive
  install() { apt-get install -y -qq --no-install-recommends "${missing[@]}"; }
  install >/dev/null 2>&1 || { apt-get update -qq && install; } >/dev/null 2>&1 ||
    { echo "slurm_up: ${missing[*]} cannot be installed" >&2; exit 3; }
fi

mkdir -p "$folder"/{etc,run,log,dev,munge} "$folder/state/d-${nodes[0]}" "$folder/state/d-${nodes[1]}"
chmod 755 "$folder" "$folder"/*/; chmod 711 "$folder/munge"
export SLURM_CONF=$folder/etc/slurm.conf
host=$(hostname -s)
getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
# MASTER_ADDR is one of them; the port makes their names, and with them their control groups, this cluster's own.
for node in "${nodes[@]}"; do echo "127.0.0.1 $node # $folder" >>/etc/hosts; done
exec 9>&-
dd if=/dev/urandom bs=1 count=1024 of="$folder/munge/key" status=none; chmod 400 "$folder/munge/key"
for i in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$folder/dev/nvidia$i"; done   # a GPU must be a character device
track=linuxproc   # the v1 freezer also holds orphans, where it may be written
if mkdir "/sys/fs/cgroup/freezer/probe.$$" 2>/dev/null; then rmdir "/sys/fs/cgroup/freezer/probe.$$"; track=cgroup; fi
printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no >"$folder/etc/cgroup.conf"
printf '%s\n' AutoDetect=off "NodeName=$names Name=gpu Type=a100 File=$folder/dev/nvidia[0-$((gpus - 1))]" \
  >"$folder/etc/gres.conf"
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again: 120 s if nothing, or less than 5, is said
AuthInfo=socket=$folder/munge/sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/state/d-%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/$track
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ReturnToService=2
# lets two real cores stand for sixteen a node
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_resolution=1,bf_continue
InactiveLimit=0
KillWait=3
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
NodeName=${nodes[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=16 RealMemory=16000 Gres=gpu:a100:$gpus State=UNKNOWN
NodeName=${nodes[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=16 RealMemory=16000 Gres=gpu:a100:$gpus State=UNKNOWN
PartitionName=low Nodes=$names Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$names PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/sock" --pid-file="$folder/run/munged.pid" \
  --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
slurmctld -f "$SLURM_CONF"
for node in "${nodes[@]}"; do slurmd -N "$node" -f "$SLURM_CONF"; done
for _ in $(seq 600); do
  [ "$(timeout 20 sinfo -h -p low -N -o %t 2>/dev/null | grep -c idle)" = 2 ] && exit 0
  sleep 0.2
done
echo "slurm_up: the nodes did not come up" >&2
tail -n 15 "$folder"/log/*.log >&2
exit 1
