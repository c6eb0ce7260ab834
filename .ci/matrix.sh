#!/usr/bin/env bash
# The wheel in fresh environments: .ci/matrix.sh [PYTHON], a line for each part, status 1 if one fails.
#   packages           an sdist, the wheel made from it, and what the package index asks of both
#   analysis, lowest   Python 3.10, the lowest versions that pyproject.toml claims, without torch and transformers
#   training, lowest   the lowest transformers, PEFT, accelerate and datasets, with the torch of constraints.txt
#   training, tested   the versions of constraints.txt
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1 PYTHONPATH=  # to compile all of torch takes a minute
failed=0

# A copy: a build folder that lies here would go into the wheel; and tests must not see the packages beside them.
mkdir "$work/source" "$work/tests"
git ls-files -zco --exclude-standard | grep -zE '^(msplora_|pyproject.toml|README.md|LICENSE)' | xargs -0 cp --parents -t "$work/source"
cp -r tests examples pyproject.toml "$work/tests"
if "$python" -m venv "$work/venv" && "$work/venv/bin/pip" install --quiet build twine >"$work/log" 2>&1 &&
    "$work/venv/bin/python" -m build --outdir "$work" "$work/source" >>"$work/log" 2>&1 &&
    "$work/venv/bin/twine" check --strict "$work"/*.whl "$work"/*.tar.gz >>"$work/log" 2>&1; then
    echo "packages: made and checked, $SECONDS s"
else
    echo "packages: FAILED"
    tail -40 "$work/log" | cut -c1-300
    exit 1
fi
wheel=$(echo "$work"/*.whl)

# "name==lowest" for each requirement of a list in pyproject.toml (project, or an extra) that states a lowest version.
lowest() {
    "$python" - "$1" <<'PY'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
of = project["dependencies"] if sys.argv[1] == "project" else project["optional-dependencies"][sys.argv[1]]
print(*(f"{m[1]}=={m[2]}" for r in of if (m := re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", r)) and m[1] != "torch"))
PY
}
pinned() { grep -iE "^($1)==" constraints.txt; }
torch=$(pinned torch)
tools="pytest pytest-xdist pytest-mpl hypothesis pillow"

part() { # TITLE PYTHON TESTS PACKAGES...
    local title=$1 base=$2 tests=$3 start=$SECONDS bin="$work/venv/bin"
    shift 3
    rm -rf "$work/venv"
    # shellcheck disable=SC2086
    if "$base" -m venv "$work/venv" && "$bin/pip" install --quiet "$@" $tools >"$work/log" 2>&1 &&
        "$bin/pip" install --quiet --no-deps "$wheel" >>"$work/log" 2>&1 &&
        (cd "$work/tests" && "$bin/msplora-analyze" examples/runs >>"$work/log" 2>&1 &&
            "$bin/python" -m pytest -p no:cacheprovider -m "not slow" --numprocesses 2 --dist worksteal $tests >>"$work/log" 2>&1); then
        echo "$title: $(grep -E '[0-9]+ passed' "$work/log" | tail -1 | tr -d '=' | xargs), $((SECONDS - start)) s in all"
    else
        failed=1
        echo "$title: FAILED"
        grep -vE '^WARNING|^ERROR: Ignored' "$work/log" | tail -40 | cut -c1-300
    fi
}

analysis=$(for name in card cli compare divergence engine figures files findings metrics overlap python_interface redundancy \
    redundancy_figures report results tables truncated watch; do echo "tests/analysis/test_$name.py"; done)
training="tests/core/test_method.py tests/core/test_pyramid.py tests/core/test_tuners.py
    tests/core/test_training.py::test_command_end_to_end"

old=""
for candidate in python3.10 ~/.pyenv/versions/3.10.*/bin/python3; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null && old=$candidate && break
done
if [ -n "$old" ]; then
    # The lowest matplotlib warns of the newest pyparsing.
    # shellcheck disable=SC2046
    part "analysis, lowest" "$old" "$analysis" 'pyparsing<3.3' $(lowest project) $(lowest report)
else
    echo "analysis, lowest: skipped, as there is no Python 3.10"
fi
# shellcheck disable=SC2046
part "training, lowest" "$python" "$training" "$torch" "$wheel[train]" $(lowest train)
# shellcheck disable=SC2046
part "training, tested" "$python" "$training" --constraint constraints.txt "$torch" "$wheel[train]"
exit $failed
