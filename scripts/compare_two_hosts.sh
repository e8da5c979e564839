#!/usr/bin/env bash
# Compares systems over a real, slow network on one machine, and how well each method hides its communication there: two
# network namespaces, joined by a veth pair whose ends are shaped with tc, are two hosts. Takes them down again, however
# it ends. Needs root and iproute2: without them it says so and ends with status 77 (skipped).
#
#   bash scripts/compare_two_hosts.sh [OUTPUT_FOLDER] [arguments of `lightseq compare`]
#
# Variables a user may set:
#   RATES      Gbit/s of the link, each way (default: "10 1 0.25")
#   DELAY_MS   one-way delay in milliseconds (default: none)
#   RANKS      ranks, half on each host (default: 2)
#   OVERLAP    flags of `lightseq bench overlap`, which runs too (default: none)
#   SYSTEMS    what to compare (default: megatron-tp-sp,megatron-tp,lightseq,lightseq-no-overlap)
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
    say "two hosts: skipped, ${#rates[@]} comparison(s) not made: $1"
    exit "$SKIPPED"
}

for program in ip tc; do
    command -v "$program" >/dev/null || skip "$program (package iproute2) is not installed"
done
[ "$(id -u)" = 0 ] || skip "network namespaces need root, this is user $(id -un)"

[ "${LIGHTSEQ_SETUP:-1}" = 0 ] || bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT" # where python finds the package, installed or not

# Names of this process's own, so that two runs do not meet.
host_a=mls-$$-a host_b=mls-$$-b link=mls0
take_down() {
    # A veth pair goes with the namespaces that hold its ends.
    ip netns del "$host_a" 2>/dev/null || true
    ip netns del "$host_b" 2>/dev/null || true
}
trap take_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$host_a" 2>/dev/null || skip "this container may not make network namespaces"
ip netns add "$host_b" || skip "this container may not make network namespaces"
ip -n "$host_a" link add "$link" type veth peer name "$link" netns "$host_b" || skip "the kernel has no veth devices"
number=0
for host in "$host_a" "$host_b"; do
    number=$((number + 1))
    ip -n "$host" addr add "192.0.2.$number/30" dev "$link"  # a network reserved for documentation: no one else's
    ip -n "$host" link set "$link" up
    ip -n "$host" link set lo up
done

# shape RATE: both directions of the link carry RATE Gbit/s. The bucket holds 4 ms of traffic, and never less than the
# largest packet that leaves a socket (64 KiB), which would else be cut and its headers counted many times.
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
    shape "$rate" || skip "tc has no tbf queue here"
    say "two hosts, $rate Gbit/s each way${DELAY_MS:+, $DELAY_MS ms}"
    python -m megatron_lightseq compare --network-namespaces "$host_a,$host_b" --interface "$link" \
        --ranks "${RANKS:-2}" --systems "${SYSTEMS:-megatron-tp-sp,megatron-tp,lightseq,lightseq-no-overlap}" \
        --output "$output" --name "two-hosts-$rate" "$@" || failed="$failed $rate"
    # shellcheck disable=SC2086 # flags are words
    python -m megatron_lightseq bench overlap ${OVERLAP:-} --network-namespaces "$host_a,$host_b" --interface "$link" \
        --ranks "${RANKS:-2}" --link "two hosts, $rate Gbit/s each way${DELAY_MS:+, $DELAY_MS ms}" \
        --out "$output" --name "overlap-$rate" || failed="$failed overlap-$rate"
done
python -m megatron_lightseq.tools.compare.link "$output" "${rates[@]}" || failed="$failed summary"
[ -z "$failed" ] || die "not everything agreed:$failed" "the tables above say what differs"
