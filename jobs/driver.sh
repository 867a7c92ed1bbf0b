#!/usr/bin/env bash
# The driver of a job that submit.sh has sent: runs on the cluster, in a copy of the checkout, and asks for no GPU itself.
set -euo pipefail
eval "set -- $LLMSYS_WORDS" # words that submit.sh has quoted for exactly this
exec python -m llmsys "$@" dispatch=ray
