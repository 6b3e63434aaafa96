#!/usr/bin/env bash
# Asks for a TPU VM, of one host or of several, and waits until it is there:
#
#     tpu_scripts/create.sh NAME --zone us-west4-a --type v5litepod-8 --runtime v2-alpha-tpuv5-lite
#
# It asks with a queued resource of the same name, which Google serves when there is room. A VM that is there already is
# taken as it is; one that was preempted, or failed, is deleted and asked for again. Started once more it goes on waiting.
#
#   --zone, --type, --runtime  as in `gcloud compute tpus queued-resources create`
#   --project P                without it, gcloud's own
#   --on-demand                no spot VM
#   --poll SECONDS             between two looks at it (30)
#   --dry-run                  print the commands instead of running them
#
# Exit codes: 0, it is there; 2, something is wrong with the command; 3, it could not be had; 130 after Ctrl-C.
# From the first moment on it costs money, until tpu_scripts/delete.sh.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_options "--zone --type --runtime --project --on-demand --poll" "$@"
[ ${#ARGUMENTS[@]} -eq 0 ] || usage "there is nothing to come after --"
DELETE="tpu_scripts/delete.sh $NAME --zone $ZONE${PROJECT:+ --project $PROJECT}"
trap 'say "stopped; $NAME may still come, and cost money: $DELETE"; exit 130' INT

tpu_ensure || die "$NAME is not to be had; it may still come, and cost money: $DELETE" 3
[ -n "$DRY_RUN" ] || say "$NAME is ready, and costs money until: $DELETE"
