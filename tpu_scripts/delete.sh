#!/usr/bin/env bash
# Deletes a TPU VM and the queued resource that asked for it, so that it costs nothing any more:
#
#     tpu_scripts/delete.sh NAME --zone us-west4-a
#
# Well if there is nothing of that name.
#
#   --zone, --project P   where it is
#   --poll SECONDS        before gcloud is asked again where it fails (30)
#   --dry-run             print the command instead of running it
#
# Exit codes: 0, it is gone; 2, something is wrong with the command; 3, it could not be deleted, and costs money.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_options "--zone --project --poll" "$@"
[ ${#ARGUMENTS[@]} -eq 0 ] || usage "there is nothing to come after --"
PLANNED=READY
tpu_delete || die "$NAME could not be deleted, and costs money: try again" 3
[ -n "$DRY_RUN" ] || say "$NAME is gone"
