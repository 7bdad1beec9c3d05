#!/usr/bin/env bash
# Runs a command in a system of Debian's suite forky, which has the newest Pythons.
#
# forky.sh make ROOT PACKAGE...    makes the system; fails where that is not possible
# forky.sh run ROOT COMMAND...     runs the command in it, this repository as its folder
#
# Both need root, and run in namespaces of their own: mounts and processes end with this
# script, however it ends.
set -euo pipefail

# The mirror that apt uses here.
mirror() {
    apt-get indextargets --format '$(ORIGIN)/$(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian/Debian" { print $2; exit }'
}

make_system() {
    local root=$1 packages
    packages=$(IFS=,; echo "${*:2}")
    # debootstrap knows the suites of its time; they are all made like sid.
    debootstrap --variant=minbase --include="ca-certificates,$packages" \
        forky "$root" "$(mirror)" sid
}

# Whatever this machine's network and pip are set up with holds in the chroot too.
run_in_system() {
    local root=$1 path
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    for path in /etc/hosts /etc/resolv.conf /etc/ssl /etc/pip.conf /etc/xdg/pip ~/.config/pip; do
        if [ -d "$path" ]; then
            mkdir -p "$root$path"
        elif [ -e "$path" ]; then
            mkdir -p "$root${path%/*}"
            touch "$root$path"
        else
            continue
        fi
        mount --bind "$path" "$root$path"
    done
    mkdir -p "$root/repository"
    mount --bind . "$root/repository"
    chroot "$root" env -C /repository "${@:2}"
}

cd "$(dirname "$0")/.."
case $1 in
make | run) exec unshare --mount --pid --fork --kill-child "$0" "in namespaces: $1" "${@:2}" ;;
"in namespaces: make") make_system "${@:2}" ;;
"in namespaces: run") run_in_system "${@:2}" ;;
esac
