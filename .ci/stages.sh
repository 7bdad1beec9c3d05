# Runs the stages of a script, each in a process group that ends with the script, and prints
# their minutes at the end. To be sourced.
folder=$(mktemp -d)
group=""
running=""
began=0
times=""

say() { printf '\n== %s\n' "$*"; }

# stage TITLE COMMAND...
stage() {
    running=$1 began=$SECONDS
    say "$1"
    set -m # a process group of its own, in which SIGINT, which tests send, is not ignored
    "${@:2}" </dev/null &
    group=$!
    set +m
    wait "$group"
    group=""
    note_time
}

note_time() {
    local seconds=$((SECONDS - began))
    times+=$(printf '%3d.%d  %s' $((seconds / 60)) $((seconds % 60 / 6)) "$running")$'\n'
    running=""
}

finish() {
    if [ -n "$group" ]; then
        kill -INT -- "-$group" 2>/dev/null || true
        for _ in {1..100}; do
            kill -0 -- "-$group" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$group" 2>/dev/null || true
    fi
    rm -rf "$folder"
    [ -z "$running" ] || note_time
    printf '\n== minutes\n%s%3d.%d  all\n' "$times" $((SECONDS / 60)) $((SECONDS % 60 / 6))
}
trap finish EXIT
