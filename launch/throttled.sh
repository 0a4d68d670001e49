#!/usr/bin/env bash
# Train on a cluster of rate-limited machines that all live on this one; needs root.
#
#   launch/throttled.sh RANKS RATE COMMAND [WORD ...]
#   launch/throttled.sh 4 500mbit python -m tightrec.trainer experiment=movielens
#   launch/throttled.sh --rate NAME RATE        change the rate of a cluster that is running
#
# Each rank gets a network namespace of its own, as a machine with one link; the links meet in a bridge. RATE
# (kbit, mbit or gbit a second, in tc's spelling; `none`: no limit) holds for what a rank sends and, at the
# bridge's port towards it, for what it receives. The namespaces see each other and nothing else: read data
# from this machine's disk. What GPUs send over NVLink or shared memory does not pass the links.
#
# COMMAND is started once a rank, with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
# MASTER_ADDR, MASTER_PORT), GLOO_SOCKET_IFNAME, and THROTTLED_NAME, the cluster's name for --rate, which a
# rank may call itself. On any end the ranks are ended and the namespaces removed; after `kill -9` of this
# script, remove them by `ip netns list` and `ip netns delete`. The exit status is that of the first rank that
# fails, else 0. Ctrl-C and SIGTERM go on to every rank; a second one ends them at once.
#
# LOCAL_WORLD_SIZE  ranks that count as one machine for torchrec's plans (default 1; links stay one a rank)
# OMP_NUM_THREADS   CPU threads of each rank (default: cores / RANKS, at least 1)
# GRACE_S           seconds between asking ranks to end and killing them (default 30)
set -euo pipefail

script="launch/throttled.sh"

refuse() {
  echo "$script: $1" >&2
  exit 2
}

require_rate() {
  [[ "$1" == none || "$1" =~ ^[1-9][0-9]{0,8}[kmg]bit$ ]] ||
    refuse "RATE is '$1'; give a whole number with kbit, mbit or gbit, as 500mbit, or none."
}

require_tools() {
  ((EUID == 0)) || refuse "it makes network namespaces, which needs root; run it as root or with sudo."
  local tool
  for tool in ip tc; do
    command -v "$tool" >/dev/null || refuse "$tool was not found; install iproute2."
  done
}

# The words for tc after `qdisc`: device $1 limited to rate $2. The bucket holds a millisecond of traffic, and
# at least 32 KiB so that a late timer costs little: a larger one lets small messages pass unlimited.
limit_words() {
  local unit="${2//[0-9]/}" number="${2%%[kmg]*}" bytes_a_ms
  case "$unit" in
    kbit) bytes_a_ms=$((number / 8)) ;;
    mbit) bytes_a_ms=$((number * 125)) ;;
    gbit) bytes_a_ms=$((number * 125000)) ;;
  esac
  echo "replace dev $1 root tbf rate $2 burst $((bytes_a_ms > 32768 ? bytes_a_ms : 32768)) latency 100ms"
}

# Limit every link of cluster $1 of $2 ranks to rate $3.
set_rate() {
  local name="$1" ranks="$2" rate="$3" rank words
  for ((rank = 0; rank < ranks; rank++)); do
    for end in "$name-r$rank eth0" "$name-bridge port$rank"; do
      read -r space device <<<"$end"
      if [[ "$rate" == none ]]; then
        # A link without a limit has nothing to remove.
        [[ "$(tc -netns "$space" qdisc show dev "$device" root)" != *tbf* ]] ||
          tc -netns "$space" qdisc del dev "$device" root
      else
        read -ra words <<<"$(limit_words "$device" "$rate")"
        tc -netns "$space" qdisc "${words[@]}"
      fi
    done
  done
}

if [[ "${1:-}" == --rate ]]; then
  (($# == 3)) || refuse "give --rate NAME RATE; NAME is THROTTLED_NAME of the cluster."
  require_rate "$3"
  require_tools
  ranks=$(ip netns list | awk -v name="$2-r" 'index($1, name) == 1' | wc -l)
  ((ranks > 0)) || refuse "there is no cluster named '$2'; \`ip netns list\` shows NAME-bridge for each."
  set_rate "$2" "$ranks" "$3"
  exit 0
fi

(($# >= 3)) || refuse "give RANKS RATE COMMAND, as 4 500mbit python -m tightrec.trainer."
ranks="$1" rate="$2"
shift 2
[[ "$ranks" =~ ^[1-9][0-9]{0,2}$ && "$ranks" -le 250 ]] ||
  refuse "RANKS is '$ranks'; give a number of ranks from 1 to 250."
require_rate "$rate"
grace_s="${GRACE_S:-30}"
[[ "$grace_s" =~ ^[0-9]{1,5}$ ]] || refuse "GRACE_S is '$grace_s'; give whole seconds."
LOCAL_WORLD_SIZE="${LOCAL_WORLD_SIZE:-1}"
[[ "$LOCAL_WORLD_SIZE" =~ ^[1-9][0-9]{0,2}$ ]] || refuse "LOCAL_WORLD_SIZE is '$LOCAL_WORLD_SIZE', not a number."
((ranks % LOCAL_WORLD_SIZE == 0)) || refuse "LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE does not divide $ranks rank(s)."
command -v "$1" >/dev/null || refuse "the command '$1' was not found."
require_tools

name="throttled-$$"
declare -A rank_of=() # process id -> rank, of the ranks that run
spaces=()
timer=""
failed=0
stopped=""

signal_ranks() {
  local pid
  for pid in "${!rank_of[@]}"; do kill -s "$1" -- "-$pid" 2>/dev/null || true; done
}

# Ask the ranks to end by signal $1, and kill those that have not after the grace time.
end_ranks() {
  signal_ranks "$1"
  if [[ -z "$timer" ]]; then
    setsid bash -c "sleep $grace_s && kill -s USR1 $$" &>/dev/null &
    timer=$!
    # Out of the table of jobs: the shell would tell of its end.
    disown "$timer"
  fi
}

# shellcheck disable=SC2329 # called by the traps
on_signal() {
  if [[ -n "$stopped" ]]; then signal_ranks KILL; else end_ranks "$1"; fi
  stopped="$1"
}

# shellcheck disable=SC2329 # called by the trap
tear_down() {
  trap '' INT TERM HUP USR1
  signal_ranks KILL
  # Itself first: it may not lead its own group yet, nor have shed this script's traps.
  [[ -z "$timer" ]] || kill -s KILL "$timer" "-$timer" 2>/dev/null || true
  local space pid
  for space in "${spaces[@]}"; do
    # Children of a rank that left its process group, as a data loader's workers may.
    for pid in $(ip netns pids "$space"); do kill -s KILL "$pid" 2>/dev/null || true; done
    ip netns delete "$space"
  done
}

trap tear_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

add_space() {
  ip netns add "$1" ||
    refuse "the kernel made no network namespace; in a container, start it with the capability SYS_ADMIN."
  spaces+=("$1")
  ip -netns "$1" link set lo up
}

add_space "$name-bridge"
ip -netns "$name-bridge" link add bridge type bridge
ip -netns "$name-bridge" link set bridge up
for ((rank = 0; rank < ranks; rank++)); do
  add_space "$name-r$rank"
  ip -netns "$name-bridge" link add "port$rank" type veth peer name eth0 netns "$name-r$rank"
  ip -netns "$name-bridge" link set "port$rank" master bridge up
  ip -netns "$name-r$rank" address add "10.0.0.$((rank + 1))/24" dev eth0
  ip -netns "$name-r$rank" link set eth0 up
done
set_rate "$name" "$ranks" "$rate"

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
export THROTTLED_NAME="$name" WORLD_SIZE="$ranks" LOCAL_WORLD_SIZE
export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM
trap 'on_signal HUP' HUP
trap 'signal_ranks KILL' USR1
# Job control gives every rank a process group of its own and leaves Ctrl-C to it; without, the shell has
# ranks in the background ignore Ctrl-C.
set -m
for ((rank = 0; rank < ranks; rank++)); do
  RANK=$rank LOCAL_RANK=$((rank % LOCAL_WORLD_SIZE)) \
    ip netns exec "$name-r$rank" "$@" </dev/null &
  rank_of[$!]=$rank
done
set +m

# The shell tells of every job that a signal ended, in words of its own.
exec 3>&2 2>/dev/null
while ((${#rank_of[@]})); do
  # Names no process on a signal, nor for a rank whose end came while another command ran: look at all.
  wait -n -p first "${!rank_of[@]}" 2>/dev/null || true
  ended="${first:-}"
  for pid in "${!rank_of[@]}"; do
    [[ "$pid" == "${first:-}" ]] || kill -s 0 "$pid" 2>/dev/null || ended="$ended $pid"
  done
  [[ -n "$ended" ]] || sleep 0.05
  for pid in $ended; do
    status=0
    wait "$pid" 2>/dev/null || status=$?
    rank="${rank_of[$pid]}"
    unset "rank_of[$pid]"
    if ((status)) && ! ((failed)); then
      failed=$status
      echo "$script: rank $rank ended with status $status; the others are ended." >&3
      end_ranks TERM
    fi
  done
done
exec 2>&3
exit "$failed"
