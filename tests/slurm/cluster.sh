#!/bin/bash
# A real Slurm on this machine, for tests. Root only.
#
#     cluster.sh up FOLDER NODES      n0 runs slurmctld, n1 .. nNODES run jobs; each has its own network, process and mount
#                                     namespaces, on one bridge
#     cluster.sh on FOLDER NODE COMMAND...    run a command on a node, as a person there would
#     cluster.sh crash FOLDER NODE    kill every process of a node at once
#     cluster.sh cut|heal FOLDER NODE pull the node's network cable, or put it back
#     cluster.sh down FOLDER          end everything
set -eu
action=$1 folder=$2
subnet=${ORRERY_TEST_SUBNET:-10.77.0}
tag=${ORRERY_TEST_TAG:-ot}

namespace() { echo "$tag-$1"; }

write_config() {
  cat >"$folder/slurm.conf" <<C
ClusterName=$tag
SlurmctldHost=n0
SlurmUser=root
# a requeued job waits for as long as credentials live
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
# jobs are spread over the nodes
SelectTypeParameters=CR_Core,CR_LLN
ReturnToService=2
SlurmdTimeout=5
KillWait=10
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
NodeName=n[1-$1] CPUs=6 RealMemory=16000
PartitionName=test Nodes=n[1-$1] Default=YES State=UP
C
  {
    for number in $(seq 0 "$1"); do echo "$subnet.$((number + 1)) n$number"; done
    echo "127.0.0.1 localhost"
  } >"$folder/hosts"
}

start_munge() {  # a daemon and a key of our own: one that the machine has already is left alone
  install -d -m 0755 -o munge -g munge "$folder/munge"
  dd if=/dev/urandom of="$folder/munge/key" bs=1 count=1024 status=none
  chown munge: "$folder/munge/key" && chmod 0400 "$folder/munge/key"
  runuser -u munge -- munged --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
}

connect() {  # connect NODE NUMBER
  ip netns add "$(namespace "$1")"
  ip link add eth0 netns "$(namespace "$1")" type veth peer name "p-$1" netns "$(namespace switch)"
  ip -n "$(namespace switch)" link set "p-$1" master bridge up
  ip -n "$(namespace "$1")" link set lo up
  ip -n "$(namespace "$1")" addr add "$subnet.$(($2 + 1))/24" dev eth0
  ip -n "$(namespace "$1")" link set eth0 up
}

start_node() {  # start_node NODE DAEMON...: its first process is the daemon, whose end is that of all others
  local node=$1
  shift
  SLURM_CONF=$folder/slurm.conf nsenter --net="/run/netns/$(namespace "$node")" \
    unshare --mount --uts --pid --fork --kill-child --mount-proc \
    bash -c "mount --bind $folder/hosts /etc/hosts; hostname $node; exec $*" \
    </dev/null >"$folder/log/$node.out" 2>&1 &
  echo $! >"$folder/$node.pid"
}

first_process() {  # of a node: the child of unshare, process 1 inside
  pgrep --parent "$(cat "$folder/$1.pid")" | head -1
}

case $action in
  up)
    nodes=$3
    mkdir -p "$folder"/{state,spool,log}
    write_config "$nodes"
    start_munge
    ip netns add "$(namespace switch)"
    ip -n "$(namespace switch)" link add bridge type bridge
    ip -n "$(namespace switch)" link set bridge up
    for number in $(seq 0 "$nodes"); do connect "n$number" "$number"; done
    start_node n0 slurmctld -D
    for number in $(seq "$nodes"); do start_node "n$number" slurmd -D -N "n$number"; done
    ;;
  start) start_node "$3" slurmd -D -N "$3" ;;
  on)
    node=$3
    shift 3
    exec nsenter --target "$(first_process "$node")" --net --pid --mount --uts --wd="$PWD" env SLURM_CONF="$folder/slurm.conf" "$@"
    ;;
  crash) kill -9 "$(first_process "$3")" ;;
  cut) ip -n "$(namespace switch)" link set "p-$3" down ;;
  heal) ip -n "$(namespace switch)" link set "p-$3" up ;;
  down)
    for file in "$folder"/n*.pid; do
      [ -e "$file" ] || continue
      node=$(basename "$file" .pid)
      first=$(first_process "$node" || true)
      [ -z "$first" ] || kill -9 "$first" || true
    done
    if [ -e "$folder/munge/pid" ]; then kill "$(cat "$folder/munge/pid")" || true; fi
    for name in $(ip netns list | awk -v tag="$tag-" 'index($1, tag) == 1 { print $1 }'); do ip netns del "$name"; done
    ;;
  *)
    echo "expected up, on, crash, start, cut, heal or down, got $action" >&2
    exit 2
    ;;
esac
