#!/usr/bin/env bash
# Installs this copy of jaxinfer on all hosts of a TPU VM, as jaxinfer-venv/bin/jaxinfer:
#
#     tpu_scripts/install.sh NAME --zone us-west4-a
#
# Once more it takes over what has changed here.
#
#   --zone, --project P   where the VM is
#   --extras LIST         of jaxinfer (tpu,gcs)
#   --with REQUIREMENTS   versions that `jaxinfer compile` has printed, or further packages:
#                         --with 'jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1'
#   --poll SECONDS        before gcloud is asked again where it fails (30)
#   --dry-run             print the commands instead of running them
#
# Exit codes: 0; 2, something is wrong with the command; 3, the VM is not there; otherwise those of gcloud and of the
# commands on the VM. Where there are several hosts, gcloud wants the key in an agent: ssh-add ~/.ssh/google_compute_engine.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_options "--zone --project --extras --with --poll" "$@"
[ ${#ARGUMENTS[@]} -eq 0 ] || usage "there is nothing to come after --"
WORKER=all
read -r -a requirements <<<"$WITH"
tpu_require
tpu_install "${EXTRAS:-tpu,gcs}" ${requirements[@]+"${requirements[@]}"} && tpu_ssh "jaxinfer-venv/bin/jaxinfer --version"
