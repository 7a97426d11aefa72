#!/usr/bin/env bash
# Tests other versions of Python, PyTorch and everything else, each set in an environment of its own:
#
#   bash tests/compatibility.sh FOLDER [oldest] [middle] [newest]
#
# FOLDER keeps the environments (6 GB each) and NAME.log. "oldest" has each dependency at the lower bound that
# pyproject.toml names, "middle" a PyTorch between, "newest" the newest of everything; .ci/run has Python 3.11 with the
# newest.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: bash tests/compatibility.sh FOLDER [oldest] [middle] [newest]}
shift
mkdir -p "$folder"
folder=$(realpath "$folder")
[ $# -gt 0 ] || set -- oldest middle newest

find_python() {
  local candidate
  for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "there is no Python $1: install it, or name other environments than this" >&2
  return 1
}

# "numpy>=1.26" in pyproject.toml becomes "numpy==1.26": what is promised is what is tested.
lower_bounds() {
  "$1" - <<'PY'
import re
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["lite"], *extras["test"], *extras["bench"], *extras["onnx"], *extras["plots"]]:
    if bound := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
PY
}

failed=()
for name in "$@"; do
  case $name in
    oldest) version=3.11 ;;
    middle) version=3.12 ;;
    newest) version=3.13 ;;
    *)
      echo "there is no environment $name: name oldest, middle or newest" >&2
      exit 2
      ;;
  esac
  python=$(find_python "$version")
  environment=$folder/$name
  constraints=$folder/$name.txt
  case $name in
    oldest) lower_bounds "$python" >"$constraints" ;;
    middle) printf 'torch==2.11.0\ntorchvision==0.26.0\n' >"$constraints" ;;
    newest) : >"$constraints" ;;
  esac
  [ -d "$environment" ] || "$python" -m venv "$environment"
  started=$SECONDS
  {
    "$environment/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" -e ".[lite,test]"
    "$environment/bin/python" -m pip list
  } >"$folder/$name.log" 2>&1 || { tail -20 "$folder/$name.log"; exit 1; }
  echo "$name: Python $version, $(grep -E '^(torch|numpy|triton) ' "$folder/$name.log" | tr -s ' ' | paste -sd,)"
  installed=$SECONDS
  "$environment/bin/python" -m pytest -q -n logical --dist worksteal >>"$folder/$name.log" 2>&1 || failed+=("$name")
  tail -1 "$folder/$name.log"
  echo "$name: installed in $((installed - started)) s, tested in $((SECONDS - installed)) s; all of it in $folder/$name.log"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
