#!/usr/bin/env bash
# Serves a model from a TPU VM on which tpu_scripts/install.sh has installed jaxinfer, to this machine alone:
#
#     tpu_scripts/install.sh NAME --zone us-west4-a --extras tpu,gcs,server
#     tpu_scripts/serve.sh NAME --zone us-west4-a -- Qwen/Qwen3-0.6B
#
# `jaxinfer serve` runs on the VM with the arguments after `--`; with several hosts on all of them, and the first one
# answers. It listens at 127.0.0.1 there, and a tunnel leads to it from 127.0.0.1 here, so that nothing is open to the
# internet. Ctrl-C ends both: requests that run may end first.
#
#   --port N              on both machines (8000)
#   --zone, --project P   where the VM is
#   --poll SECONDS        before gcloud is asked again where it fails (30)
#   --dry-run             print the commands instead of running them
#
# Exit codes: those of `jaxinfer serve`; 2, something is wrong with the command; 3, the VM is not there; 130 after Ctrl-C.
# Where there are several hosts, gcloud wants the key in an agent: ssh-add ~/.ssh/google_compute_engine.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PORT=8000
read_options "--zone --project --port --poll" "$@"
[[ $PORT =~ ^[0-9]+$ && $PORT -gt 0 && $PORT -lt 65536 ]] || usage "--port is $PORT: it must be from 1 to 65535"
[[ " ${ARGUMENTS[*]-} " != *" --port"[\ =]* ]] || usage "--port comes before --, as the tunnel needs it, too"
tpu_require

if [ -n "$DRY_RUN" ]; then
    tpu_tunnel "$PORT"
    tunnel=''
else
    tpu_tunnel "$PORT" &
    tunnel=$!
fi
WORKER=all
# A connection that ends leaves what ran on the VM running. The brackets: this command is not meant itself.
stopped=''
trap 'stopped=1; tpu_ssh "pkill -TERM -f \"[j]axinfer serve --port $PORT\"" || true' INT TERM
tpu_ssh "jaxinfer-venv/bin/jaxinfer serve --port $PORT${ARGUMENTS[*]:+ $(quoted "${ARGUMENTS[@]}")}" &
job=$!
code=0
while kill -0 "$job" 2>/dev/null; do # a signal ends the waiting, not the job
    wait "$job"
    code=$?
done
[ -z "$tunnel" ] || kill "$tunnel" 2>/dev/null
[ -z "$stopped" ] || exit 130
exit "$code"
