#!/usr/bin/env bash
# Tests dskd-fast inside other programs, each in an environment of its own, since they bring many packages:
#
#   bash tests/integrations.sh FOLDER [NAME | NAME==VERSION]...
#
# FOLDER keeps the environments (7 GB each) and a log of each. NAME is an extra of pyproject.toml, a module of
# dskd_fast/integrations and tests/integrations/test_NAME.py. Without any: Ray, and the oldest anomalib that
# pyproject.toml allows and the newest that was tested. PYTHON may name another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: bash tests/integrations.sh FOLDER [NAME | NAME==VERSION]...}
shift
mkdir -p "$folder"
folder=$(realpath "$folder")
[ $# -gt 0 ] || set -- ray anomalib==2.2.0 anomalib==2.7.0

failed=()
for wanted in "$@"; do
  name=${wanted%%==*}
  test=tests/integrations/test_$name.py
  if [ ! -f "$test" ]; then
    echo "there is no $test: name one of $(ls tests/integrations | sed -n 's/^test_\(.*\)\.py$/\1/p' | paste -sd' ')" >&2
    exit 2
  fi
  environment=$folder/${wanted/==/-}
  log=$environment.log
  [ -d "$environment" ] || "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install -q --disable-pip-version-check -e ".[lite,test,$name]" "$wanted" >"$log" 2>&1 ||
    { tail -20 "$log"; exit 1; }
  "$environment/bin/python" -m pip list >>"$log" 2>&1
  echo "$wanted: $(grep -E "^(torch|$name) " "$log" | tr -s ' ' | paste -sd,)"
  "$environment/bin/python" -m pytest -q --all "$test" >>"$log" 2>&1 || failed+=("$wanted")
  tail -1 "$log"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; see $folder"
  exit 1
fi
