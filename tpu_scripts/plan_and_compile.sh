#!/usr/bin/env bash
# Plans a deployment and compiles all its programs, on this machine, which needs no TPU:
#
#     tpu_scripts/plan_and_compile.sh configs/llama-3.1-8b_v5e-8.yaml --output gs://my-bucket/llama-v5e-8
#
# Needs: pip install '.[tpu,gcs]'. It prints the versions that the VM must have too: tpu_scripts/install.sh takes
# them with --with. Done once more, it replaces what it wrote.
#
#   --output DIR   a folder, or a URL that the VM can read
#   --dry-run      print the commands instead of running them
#   -- OPTIONS     further options of both `jaxinfer plan` and `jaxinfer compile`: --topology, --mesh, --max-num-seqs ...
#
# Exit codes: 0; 1, the model does not fit the slice, and what would is said; 2, something is wrong.
set -uo pipefail

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_options "--output" "$@"
[ -n "$DRY_RUN" ] || command -v jaxinfer >/dev/null || die "jaxinfer is not installed: pip install '.[tpu,gcs]'"
set -- ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
run jaxinfer plan "$NAME" "$@" || exit
run jaxinfer compile "$NAME" "$@" "--output=$OUTPUT" || exit
[ -n "$DRY_RUN" ] || say "on a VM with the versions that are named above, in --with of tpu_scripts/install.sh, give \
--compiled $OUTPUT with the same model"
