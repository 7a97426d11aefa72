#!/usr/bin/env bash
# Tests dskd-fast inside other programs, each in an environment of its own, since they bring many packages:
#
#   bash tests/integrations.sh FOLDER [ray]
#
# FOLDER keeps the environments and NAME.log. NAME is an extra of pyproject.toml, a module of dskd_fast/integrations and
# tests/integrations/test_NAME.py. PYTHON may name another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: bash tests/integrations.sh FOLDER [ray]}
shift
mkdir -p "$folder"
folder=$(realpath "$folder")
[ $# -gt 0 ] || set -- ray

failed=()
for name in "$@"; do
  test=tests/integrations/test_$name.py
  if [ ! -f "$test" ]; then
    echo "there is no $test: name one of $(ls tests/integrations | sed -n 's/^test_\(.*\)\.py$/\1/p' | paste -sd' ')" >&2
    exit 2
  fi
  environment=$folder/$name
  [ -d "$environment" ] || "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install -q --disable-pip-version-check -e ".[lite,test,$name]" >"$folder/$name.log" 2>&1 ||
    { tail -20 "$folder/$name.log"; exit 1; }
  echo "$name: $("$environment/bin/python" -m pip list 2>/dev/null | grep -E "^(torch|$name) " | tr -s ' ' | paste -sd,)"
  "$environment/bin/python" -m pytest -q --all "$test" 2>&1 | tee -a "$folder/$name.log" | tail -5 || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
