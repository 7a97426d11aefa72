#!/usr/bin/env bash
# All that one GPU can show in ten minutes, without a network:
#
#   bash bench/gpu.sh OUT [--minutes M] [--rehearse]
#
# OUT gets table.md, summary.json, results.jsonl and output.txt, complete after every step. The exit code is 0 if every
# step has results. PYTHON names the interpreter (default: python3).
set -u
cd "$(dirname "$0")/.." || exit 2
out=${1:?usage: bash bench/gpu.sh OUT [--minutes M] [--rehearse]}
shift
mkdir -p "$out" && out=$(realpath "$out") || exit 2
rm -f "$out"/{table.md,summary.json,results.jsonl,output.txt}
python=${PYTHON:-python3}

install() {
  timeout -k 5 60 "$python" -m pip install -q -e . --no-deps --no-build-isolation --disable-pip-version-check
}
if ! install >"$out/output.txt" 2>&1; then
  # A folder with the packages where an installation would have put them.
  echo "pip did not install the package: it is imported through links instead" | tee -a "$out/output.txt"
  links=$(mktemp -d)
  trap 'rm -rf "$links"' EXIT
  mkdir "$links/dskd_fast"
  ln -s "$PWD"/dskd_fast/* "$PWD/kernels" "$PWD/csrc" "$links/dskd_fast/"
  export PYTHONPATH="$links:$PWD" PYTHONSAFEPATH=1
fi

# The driver ends in time by itself, whatever installing took; this is for one that does not.
timeout -k 10 $((585 - SECONDS)) "$python" -m bench.gpu --out "$out" --spent "$SECONDS" "$@"
code=$?
if [ ! -e "$out/table.md" ]; then
  { echo "The driver ended with code $code and without a table:"; tail -c 2000 "$out/output.txt"; } >"$out/table.md"
fi
exit $code
