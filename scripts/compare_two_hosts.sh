#!/usr/bin/env bash
# Compares systems over a real, slow network on one machine, and measures how well each method hides its communication.
# Two network namespaces act as two hosts; they are connected by a veth pair whose ends are shaped with tc. They are
# always removed at the end. Needs root and iproute2; otherwise prints the reason and exits with status 77 (skipped).
#
#   bash scripts/compare_two_hosts.sh [OUTPUT_FOLDER] [arguments of `lightseq compare`]
#
# Environment variables:
#   RATES      rates of the link in Gbit/s, in each direction (default: "10 1 0.25")
#   DELAY_MS   one-way delay in milliseconds (default: none)
#   RANKS      number of ranks, half of them on each host (default: 2)
#   OVERLAP    flags for `lightseq bench overlap`, which also runs (default: none)
#   SYSTEMS    systems to compare (default: megatron-tp-sp,megatron-tp,lightseq,lightseq-no-overlap)
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

SKIPPED=77
read -r -a rates <<<"${RATES:-10 1 0.25}"
output=$ROOT/results
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    output=$1
    shift
fi

skip() {
    say "two hosts: skipped ${#rates[@]} comparison(s): $1"
    exit "$SKIPPED"
}

for program in ip tc; do
    command -v "$program" >/dev/null || skip "$program (package iproute2) is not installed"
done
[ "$(id -u)" = 0 ] || skip "network namespaces need root, and the user is $(id -un)"

[ "${LIGHTSEQ_SETUP:-1}" = 0 ] || bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT" # python finds the package here, whether installed or not

# Names with the process ID, so that several runs do not interfere.
host_a=mls-$$-a host_b=mls-$$-b link=mls0
take_down() {
    # Removing the namespaces also removes the veth pair.
    ip netns del "$host_a" 2>/dev/null || true
    ip netns del "$host_b" 2>/dev/null || true
}
trap take_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$host_a" 2>/dev/null || skip "this container must not create network namespaces"
ip netns add "$host_b" || skip "this container must not create network namespaces"
ip -n "$host_a" link add "$link" type veth peer name "$link" netns "$host_b" || skip "the kernel has no veth devices"
number=0
for host in "$host_a" "$host_b"; do
    number=$((number + 1))
    ip -n "$host" addr add "192.0.2.$number/30" dev "$link"  # a network that is reserved for documentation
    ip -n "$host" link set "$link" up
    ip -n "$host" link set lo up
done

# shape RATE: limits both directions of the link to RATE Gbit/s. The bucket holds 4 ms of traffic, and at least the
# largest packet of a socket (64 KiB), which would otherwise be split, so that its headers would be counted several times.
shape() {
    local burst host
    burst=$(awk -v rate="$1" 'BEGIN { bytes = rate * 1e9 / 8 * 0.004; printf "%d", bytes < 131072 ? 131072 : bytes }')
    for host in "$host_a" "$host_b"; do
        tc -n "$host" qdisc replace dev "$link" root handle 1: tbf rate "${1}gbit" burst "$burst" latency 100ms
        if [ -n "${DELAY_MS:-}" ]; then
            tc -n "$host" qdisc replace dev "$link" parent 1: handle 10: netem delay "${DELAY_MS}ms" limit 100000
        fi
    done
}

failed=''
for rate in "${rates[@]}"; do
    shape "$rate" || skip "tc does not support tbf queues here"
    say "two hosts, $rate Gbit/s in each direction${DELAY_MS:+, $DELAY_MS ms delay}"
    python -m megatron_lightseq compare --network-namespaces "$host_a,$host_b" --interface "$link" \
        --ranks "${RANKS:-2}" --systems "${SYSTEMS:-megatron-tp-sp,megatron-tp,lightseq,lightseq-no-overlap}" \
        --output "$output" --name "two-hosts-$rate" "$@" || failed="$failed $rate"
    # shellcheck disable=SC2086  # OVERLAP is a list of flags
    python -m megatron_lightseq bench overlap ${OVERLAP:-} --network-namespaces "$host_a,$host_b" --interface "$link" \
        --ranks "${RANKS:-2}" --link "two hosts, $rate Gbit/s in each direction${DELAY_MS:+, $DELAY_MS ms delay}" \
        --out "$output" --name "overlap-$rate" || failed="$failed overlap-$rate"
done
python -m megatron_lightseq.tools.compare.link "$output" "${rates[@]}" || failed="$failed summary"
[ -z "$failed" ] || die "these comparisons failed:$failed" "the tables above show what differs"
