#!/usr/bin/env bash
# Runs `jaxinfer generate` on a TPU VM on which tpu_scripts/install.sh has installed it:
#
#     tpu_scripts/generate.sh NAME --zone us-west4-a -- --model Qwen/Qwen3-0.6B --chat "Why is the sky blue?"
#
# With several hosts it runs on all of them, which is what a model over all chips takes; the first one prints.
#
#   --zone, --project P   where the VM is
#   --poll SECONDS        before gcloud is asked again where it fails (30)
#   --dry-run             print the command instead of running it
#
# Exit codes: those of `jaxinfer generate`; 2, something is wrong with the command; 3, the VM is not there. Where there are
# several hosts, gcloud wants the key in an agent: ssh-add ~/.ssh/google_compute_engine.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_options "--zone --project --poll" "$@"
[ ${#ARGUMENTS[@]} -gt 0 ] || usage "after -- come the arguments of jaxinfer generate"
WORKER=all
tpu_require
tpu_ssh "jaxinfer-venv/bin/jaxinfer generate $(quoted "${ARGUMENTS[@]}")"
