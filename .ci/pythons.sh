# Runs the tests on each other Python that is to be had. To be sourced behind stages.sh; uses the
# environment that .ci/run makes.

# These tests depend on a server, an engine, a browser or mypy more than on the Python, or take
# minutes: more than half of the time. The gate runs them on the oldest Python, and .ci/long on each.
outer=(
    --ignore=tests/celery/test_{away,brokers,django,engine,flask,own_tasks,refused,worker}.py
    --deselect=tests/docs/test_pages.py::test_the_python_blocks_are_typed
    --ignore=tests/docs/test_{celery_example,tracing}.py
    --ignore=tests/dramatiq
    --ignore=tests/monitor
    --ignore=tests/opentelemetry
    --ignore=tests/outbox/test_engines.py
    --ignore=tests/request/test_interrupted.py
    --ignore=tests/rq
    --ignore=tests/sentry
    --ignore=tests/servers
    --ignore=tests/serving/test_tasks_command.py
    --ignore=tests/worker
)

# The interpreter of a version: on the path, or one that pyenv keeps.
find_python() {
    local candidate
    for candidate in "python$1" "$(pyenv root 2>/dev/null)"/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# test_on VERSION PYTHON ARGUMENT...
test_on() {
    PATH="$(dirname "$(command -v "$2")"):$PATH" \
        .venv/bin/nox --envdir "$folder/nox" --sessions "tests-$1" -- "${@:3}"
}

# test_in_forky VERSION ARGUMENT...
test_in_forky() {
    local in_forky=(.ci/forky.sh run "$folder/forky") venv="/venv-$1"
    "${in_forky[@]}" "python$1" -m venv "$venv"
    "${in_forky[@]}" "$venv/bin/pip" install --quiet '.[test]'
    "${in_forky[@]}" "$venv/bin/python" -m pytest --quiet -n auto "${@:2}"
}

make_forky() {
    if ! .ci/forky.sh make "$folder/forky" python3.14-venv python3.15-venv \
        >"$folder/forky.log" 2>&1; then
        tail -n 3 "$folder/forky.log"
        rm -rf "$folder/forky"
    fi
}

# test_each_python whole    all tests on each Python
# test_each_python part     without the outer tests
test_each_python() {
    local version python left_out
    stage "a system of Debian's suite forky, for its Pythons" make_forky
    left_out=()
    [ "$1" = whole ] || left_out=("${outer[@]}")
    for version in 3.11 3.12 3.13 3.14 3.15; do
        if .venv/bin/python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')"; then
            continue
        elif python=$(find_python "$version"); then
            stage "tests on Python $version" test_on "$version" "$python" "${left_out[@]}"
        elif [ -e "$folder/forky/usr/bin/python$version" ]; then
            stage "tests on Python $version of forky" test_in_forky "$version" "${left_out[@]}"
        else
            say "Python $version is not here, and no system with it could be made: not tested"
        fi
    done
}
