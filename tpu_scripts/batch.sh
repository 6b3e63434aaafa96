#!/usr/bin/env bash
# A batch job on a spot TPU VM that comes back after preemption:
#
#     tpu_scripts/batch.sh NAME --zone us-east5-b --type v6e-1 --runtime v2-alpha-tpuv6e -- \
#         gs://my-bucket/rows.parquet --output gs://my-bucket/answers --model Qwen/Qwen3-0.6B --task generate
#
# Asks for the VM, installs jaxinfer on it and runs `jaxinfer batch` with the arguments after `--`. When the VM is
# preempted, it is deleted and asked for again, and the same command goes on after the last part that was written. At the
# end the VM is deleted. Killed itself, the script is started again in the same way, and takes the VM that is there.
#
#   --zone, --type, --runtime  as in `gcloud compute tpus queued-resources create`; a type of one host
#   --project P                without it, gcloud's own
#   --on-demand                no spot VM
#   --keep                     leave the VM at the end
#   --poll SECONDS             between two looks at the VM (30)
#   --dry-run                  print the commands instead of running them
#
# Exit codes: those of `jaxinfer batch` (0 complete, 1 rows have errors, 2 something is wrong); 3 where the VM could not be
# had or used. For several VMs, give each a NAME, `--shard I/N` and the same output; then `jaxinfer batch --merge OUT`.
#
# Not checked, for want of a TPU: that the states and exit codes of gcloud are what its documentation says, how long an
# installation takes, and that a VM's service account may read and write the bucket.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_options "--zone --type --runtime --project --poll --on-demand --keep" "$@"
[ ${#ARGUMENTS[@]} -gt 0 ] || usage "after -- come the arguments of jaxinfer batch"
set -- "${ARGUMENTS[@]}"
[[ " $* " =~ \ (-o|--output)(=|\ )[a-z0-9]+:// ]] || usage "--output must be on gs://: a spot VM's own disk is lost with it"

# One process at a time may use the TPU: where the connection broke, the command of before may still run, and is waited
# for. Its own exit codes, 0 to 2, become 40 to 42, which are neither ssh's nor gcloud's.
JOB="flock .jaxinfer-batch.lock jaxinfer-venv/bin/jaxinfer batch $(quoted "$@"); code=\$?; \
[ \$code -gt 2 ] || code=\$((code + 40)); exit \$code"

# end CODE: with the VM deleted.
end() {
    if [ -n "$KEEP" ]; then
        say "$NAME is kept, and costs money: gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
    else
        tpu_delete || die "$NAME could not be deleted, and costs money: try again" 3
    fi
    exit "$1"
}

LEFT="$NAME may still be there and cost money; the same command goes on, and deletes it"
trap 'say "stopped; $LEFT"; exit 130' INT

troubles=0 # in a row, while the VM was there all the time
while [ "$troubles" -lt 5 ]; do
    tpu_ensure || die "$NAME is not to be had; $LEFT" 3
    if tpu_install tpu,batch,gcs; then
        begun=$SECONDS
        tpu_ssh "$JOB"
        code=$?
        [ -z "$DRY_RUN" ] || end 0
        case $code in
            40 | 41 | 42) end $((code - 40)) ;;
        esac
        [ $((SECONDS - begun)) -lt 600 ] || troubles=0 # a connection breaks now and then
    else
        code=$?
    fi
    sleep "$POLL" # how the VM is shows a little later
    state=$(tpu_state) || die "$LEFT" 3
    if [ "$state" = READY ]; then
        troubles=$((troubles + 1))
        say "$NAME is there, but the command on it failed with code $code: trying again"
    else
        troubles=0
        say "$NAME was preempted: asking for it again"
    fi
done
say "error: $NAME is there, but does not work; it is deleted, and the same command goes on"
end 3
