# shellcheck shell=bash
# What the scripts of this folder have in common: one TPU VM, which a queued resource of the same name asks for. This file
# is sourced.
#
# read_options sets what the functions below it take: NAME, ZONE, TYPE (accelerator), RUNTIME (version), PROJECT ("":
# gcloud's own), SPOT ("": none), POLL (seconds), PORT, WORKER ("": the first host, "all"), DRY_RUN ("": run), and ARGUMENTS,
# what comes after `--`.
#
# Commands and states: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources and
# https://cloud.google.com/tpu/docs/queued-resources. None of this has run against a TPU: only against a stand-in for
# gcloud, by tests/tpu_scripts.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PLANNED=NONE # with --dry-run, what the state would be

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die MESSAGE [CODE]
die() {
    say "error: $1"
    exit "${2:-2}"
}

# The script's first lines.
help() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# usage MESSAGE: for a wrong command line.
usage() { die "$1; see ${0##*/} --help"; }

# read_options OPTIONS ARGUMENTS...: OPTIONS are those that the script has, in one word. Those of them that have no
# default must be given, and a name.
# shellcheck disable=SC2034  # some are for the script alone
read_options() {
    local has=" $1 --dry-run " option
    shift
    NAME='' ZONE='' TYPE='' RUNTIME='' PROJECT='' SPOT=1 POLL=30 DRY_RUN='' KEEP='' WORKER='' EXTRAS='' WITH='' OUTPUT=''
    ARGUMENTS=()
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help)
                help
                exit 0
                ;;
            --)
                shift
                ARGUMENTS=("$@")
                break
                ;;
            -*)
                [[ $has == *" $1 "* ]] || usage "there is no option $1"
                case $1 in
                    --on-demand) SPOT='' ;;
                    --keep) KEEP=1 ;;
                    --dry-run) DRY_RUN=1 ;;
                    *)
                        [ $# -gt 1 ] || usage "$1 needs a value"
                        option=$(tr '[:lower:]' '[:upper:]' <<<"${1#--}")
                        printf -v "$option" %s "$2"
                        shift
                        ;;
                esac
                ;;
            *)
                [ -z "$NAME" ] || usage "both $NAME and $1 are names"
                NAME=$1
                ;;
        esac
        shift
    done
    for option in NAME ZONE TYPE RUNTIME OUTPUT; do
        [[ "$has --name " != *" --$(tr '[:upper:]' '[:lower:]' <<<"$option") "* ]] || [ -n "${!option}" ] || usage "$option is missing"
    done
    [[ $POLL =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage "--poll is $POLL: it must be seconds"
    [[ $has != *" --zone "* || -n "$DRY_RUN" ]] || command -v gcloud >/dev/null ||
        die "gcloud is not installed: https://cloud.google.com/sdk"
}

# The words as they would be typed.
quoted() {
    local words
    printf -v words '%q ' "$@"
    printf '%s' "${words% }"
}

# Runs a command; with --dry-run, prints it. Commands of gcloud must not eat the script's input.
run() {
    if [ -n "$DRY_RUN" ]; then
        quoted "$@"
        echo
    else
        "$@" </dev/null
    fi
}

# tpus GROUP COMMAND ARGUMENTS...: `gcloud compute tpus`, which asks no questions.
tpus() {
    run gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

# describe GROUP FIELD: a field of the queued resource or the VM, or NONE if it is not there. gcloud is asked again where
# it fails: its own troubles are not the VM's.
describe() {
    local answer try
    for try in 1 2 3 4 5; do
        if answer=$(gcloud compute tpus "$1" describe "$NAME" "--format=value($2)" "--zone=$ZONE" \
            ${PROJECT:+"--project=$PROJECT"} --quiet --verbosity=error </dev/null 2>&1); then
            printf '%s\n' "$answer"
            return
        elif grep -qiE 'NOT_FOUND|not found' <<<"$answer"; then
            echo NONE
            return
        fi
        [ "$try" = 5 ] || sleep "$POLL"
    done
    say "error: gcloud can't say how $NAME is: ${answer##*$'\n'}"
    return 1
}

# READY; NONE: there is nothing; WAITING: for Google; or GONE: preempted, failed or stopped, and to be deleted.
tpu_state() {
    if [ -n "$DRY_RUN" ]; then
        echo "$PLANNED"
        return
    fi
    local state
    state=$(describe queued-resources state.state) || return
    if [ "$state" = ACTIVE ]; then # which it may still be while its VM is gone
        state=$(describe tpu-vm state) || return
        [ "$state" != NONE ] || state=GONE
    fi
    case $state in
        READY | NONE) echo "$state" ;;
        CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | SUSPENDING | DELETING) echo WAITING ;;
        STARTING | RESTARTING | REIMAGING | REPAIRING | STOPPING) echo WAITING ;;
        *) echo GONE ;;
    esac
}

tpu_create() {
    tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" \
        ${SPOT:+--spot} --async
    PLANNED=READY
}

# Deletes the VM and the request for it, which would use up quota; well if there is nothing.
tpu_delete() {
    local state
    state=$(tpu_state) || return
    [ "$state" = NONE ] || tpus queued-resources delete "$NAME" --force
    PLANNED=NONE
}

# Waits until the VM is ready. One that is gone is deleted, and asked for anew; one that is there is taken.
tpu_ensure() {
    local state asked=0 shown=
    while true; do
        state=$(tpu_state) || return
        [ "$state" = "$shown" ] || [ -n "$DRY_RUN" ] || say "$NAME: $state"
        shown=$state
        case $state in
            READY) return ;;
            NONE)
                if [ "$asked" = 5 ]; then
                    say "error: $NAME was asked for $asked times and never came: is there quota for $TYPE in $ZONE?"
                    return 1
                fi
                tpu_create || return
                asked=$((asked + 1))
                ;;
            GONE) tpu_delete || return ;;
        esac
        [ -n "$DRY_RUN" ] || sleep "$POLL"
    done
}

# For what needs a VM that is there.
tpu_require() {
    local state
    [ -z "$DRY_RUN" ] || return 0
    state=$(tpu_state) || exit 3
    [ "$state" = READY ] || die "$NAME is not ready ($state): tpu_scripts/create.sh" 3
}

# tpu_ssh COMMAND: runs it on the VM. Its exit code, or 255 where there was no connection, or 1 where gcloud had trouble.
tpu_ssh() {
    tpus tpu-vm ssh "$NAME" ${WORKER:+"--worker=$WORKER"} "--command=$1"
}

# tpu_tunnel PORT: leads from this port here to that of the first host, until it is killed: to be run in the background.
tpu_tunnel() {
    local command=(gcloud compute tpus tpu-vm ssh "$NAME" --worker=0 "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet)
    command+=(-- -N -L "$1:127.0.0.1:$1")
    [ -n "$DRY_RUN" ] || exec "${command[@]}" </dev/null
    run "${command[@]}"
}

# tpu_install EXTRAS [REQUIREMENTS...]: installs this copy of jaxinfer on the VM as jaxinfer-venv/bin/jaxinfer, with a Python
# of its own: the VM's is older than 3.11. Quick where it was done before.
tpu_install() {
    local folder archive extras=$1
    shift
    folder=$(mktemp -d)
    archive=$folder/jaxinfer.tar.gz
    run tar -C "$ROOT" --exclude=__pycache__ -czf "$archive" pyproject.toml README.md LICENSE jaxinfer &&
        tpus tpu-vm scp "$archive" "$NAME:jaxinfer.tar.gz" ${WORKER:+"--worker=$WORKER"} &&
        tpu_ssh "set -e; rm -rf jaxinfer-source; mkdir jaxinfer-source; tar -C jaxinfer-source -xzf jaxinfer.tar.gz; \
python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python 3.12 jaxinfer-venv; \
python3 -m uv pip install --quiet --python jaxinfer-venv --reinstall-package jaxinfer './jaxinfer-source[$extras]'${1:+ $(quoted "$@")}"
    local code=$?
    rm -rf "$folder"
    return "$code"
}
