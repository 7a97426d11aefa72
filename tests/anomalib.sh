#!/usr/bin/env bash
# Tests DSKD inside anomalib, each version of that in an environment of its own:
#
#   bash tests/anomalib.sh FOLDER [VERSION...]
#
# FOLDER keeps the environments (7 GB each) and anomalib-VERSION.log. Without a version it takes the oldest that
# pyproject.toml allows and the newest that was tested.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: bash tests/anomalib.sh FOLDER [VERSION...]}
shift
mkdir -p "$folder"
folder=$(realpath "$folder")
[ $# -gt 0 ] || set -- 2.2.0 2.7.0

failed=()
for version in "$@"; do
  environment=$folder/anomalib-$version
  log=$folder/anomalib-$version.log
  [ -d "$environment" ] || python3.11 -m venv "$environment"
  # anomalib 2.2 imports requests and does not ask for it.
  "$environment/bin/python" -m pip install -q --disable-pip-version-check \
    -e ".[lite,test,anomalib]" "anomalib==$version" requests >"$log" 2>&1 || { tail -20 "$log"; exit 1; }
  "$environment/bin/python" -m pip list >>"$log" 2>&1
  echo "anomalib $version, $(grep -E '^(torch|lightning|pandas) ' "$log" | tr -s ' ' | paste -sd,)"
  "$environment/bin/python" -m pytest -q tests/integrations --all >>"$log" 2>&1 || failed+=("$version")
  tail -1 "$log"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; see $folder"
  exit 1
fi
