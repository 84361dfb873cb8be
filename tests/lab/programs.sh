#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# programs.sh NAME: makes build/NAME.cpio, which is put over the guest under test: programs as Debian
# packages them with what they are linked with, and those of their surroundings that busybox has in another
# form. Made when asked for; only the cases that are called like it want it, and those of packages/* the last:
#
# databases   the servers of MariaDB and PostgreSQL, and a fresh data folder of each (/srv/mariadb,
#             /srv/postgresql); what the QEMU guest agent calls around a freeze
# volumes     what an administrator makes volumes with (LVM, md, LUKS), and fio
# mariadb     the server of MariaDB as the disk of an administrator's, build/mariadb.ext4: its programs, and in
#             /srv/mariadb a fresh data folder
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

# data_of_mariadb: its fresh data folder.
data_of_mariadb() {
    mkdir -p /srv/mariadb
    chown mysql: /srv/mariadb
    # As small as it can be: it is copied to a disk by an emulated processor.
    mariadb-install-db --no-defaults --user=mysql --datadir=/srv/mariadb --skip-test-db --force \
        --auth-root-authentication-method=socket --innodb-log-file-size=4M \
        --innodb-data-file-path=ibdata1:4M:autoextend --innodb-autoextend-increment=1
}

name=$([ "$1" = --inside ] && echo "$2" || echo "$1")
# folders: what is copied besides, with all that is in them
# prepare: what is done with the programs before they are copied
case $name in
databases)
    postgresql=/usr/lib/postgresql/17
    packages=(mariadb-server-core mariadb-client-core postgresql-17 qemu-guest-agent)
    programs=(
        /usr/sbin/mariadbd /usr/bin/{mariadb,psql}
        "$postgresql"/bin/{postgres,pg_amcheck,pg_controldata}
        # busybox's have other options
        /usr/bin/{mkfifo,setpriv,sleep,timeout}
    )
    folders=(/etc/qemu /srv /usr/share/mariadb/{charsets,english} "$postgresql"/lib /usr/share/postgresql/17)
    prepare() {
        printf '%s\n' root:x:0:0:root:/root:/bin/sh mysql:x:101:101::/nonexistent:/bin/false \
            postgres:x:102:102::/srv/postgresql:/bin/sh >/etc/passwd
        printf '%s\n' root:x:0: mysql:x:101: postgres:x:102: >/etc/group
        data_of_mariadb
        mkdir -p /srv/postgresql
        chown postgres: /srv/postgresql
        # As small, too. PostgreSQL knows GMT by itself.
        TZ=GMT setpriv --reuid postgres --regid postgres --clear-groups "$postgresql/bin/initdb" \
            -D /srv/postgresql --no-sync --locale=C --encoding=UTF8 --auth-local=peer --auth-host=reject --wal-segsize=1
        # Instead of Debian's wrapper, which is in Perl.
        ln -sf "$postgresql/bin/psql" /usr/bin/psql
        rm -r "$postgresql"/lib/{llvmjit*,bitcode,pgxs}
    }
    ;;
volumes)
    packages=(lvm2 mdadm cryptsetup-bin fio)
    programs=(/usr/sbin/{lvm,mdadm,cryptsetup} /usr/bin/fio)
    folders=(/etc/lvm)
    prepare() { printf '%s\n' root:x:0:0:root:/root:/bin/sh >/etc/passwd; }
    ;;
mariadb)
    packages=(mariadb-server-core mariadb-client-core e2fsprogs)
    programs=(/usr/sbin/mariadbd /usr/bin/mariadb)
    folders=(/srv /usr/share/mariadb/{charsets,english})
    prepare() {
        printf '%s\n' root:x:0:0:root:/root:/bin/sh mysql:x:101:101::/nonexistent:/bin/false >/etc/passwd
        printf '%s\n' root:x:0: mysql:x:101: >/etc/group
        data_of_mariadb
    }
    ;;
*) die "usage: programs.sh databases|volumes|mariadb" ;;
esac
options=(
    # Unpacked and not configured: nothing here starts as a service.
    --variant=extract --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*'
    --aptopt='APT::Install-Recommends "false"'
)

# The part below runs in the root with the programs, with build/ at /build.
if [ "$1" = --inside ]; then
    prepare
    {
        printf '%s\n' /etc/passwd "${programs[@]}"
        [ ! -e /etc/group ] || echo /etc/group
        # shellcheck disable=SC2046  # one word a library
        ldd "${programs[@]}" $(find "${folders[@]}" -name '*.so') | sed -n 's/^\t\(.* => \)\?\(\/[^ ]*\) (.*/\2/p'
        find "${folders[@]}"
    } | sort -u | while read -r path; do
        # with the folders that it is in; usr is merged
        [ "${path#/lib}" = "$path" ] || path=/usr$path
        while [ "$path" != / ]; do
            echo ".$path"
            path=$(dirname "$path")
        done
    done | sort -u >/tmp/files
    # cpio keeps links as they are; the names that libraries are looked for by are links.
    cd /
    while read -r path; do
        [ ! -L "$path" ] || realpath --relative-to=. "$path" | sed 's|^|./|'
    done </tmp/files >/tmp/targets
    sort -u /tmp/files /tmp/targets >/tmp/all
    if [ "$name" = mariadb ]; then
        mkdir /tmp/disk
        cpio --quiet -pdm /tmp/disk </tmp/all
        size=$(($(du -sm /tmp/disk | cut -f 1) * 11 / 10 + 64))
        mke2fs -q -t ext4 -L "$name" -d /tmp/disk "/build/$name.ext4.new" "${size}M"
        mv "/build/$name.ext4.new" "/build/$name.ext4"
    else
        cpio --quiet -o -H newc </tmp/all >"/build/$name.cpio.new"
        mv "/build/$name.cpio.new" "/build/$name.cpio"
    fi
    exit 0
fi

"$lab/root.sh"
key=$(key_of "$(cat "$build/stamps/root" "$lab/programs.sh")")
made=$build/$name.cpio
[ "$name" != mariadb ] || made=$build/$name.ext4
begin "$name" "$made" "$key" "making the programs for $name"
say "making the programs for $name (Debian trixie: ${packages[*]})"
target=$build/$name.root
rm -rf --one-file-system "$target"
# and what their set-up is done with
packages+=(bash coreutils cpio dash findutils grep hostname libc-bin mawk sed util-linux)
comma=$(IFS=,; printf '%s' "${packages[*]}")
# From where, and how it is reached, is what the build root was made with.
quietly "$name.log" mmdebstrap "${options[@]}" --aptopt="$root/etc/apt/apt.conf.d/99mmdebstrap" \
    --setup-hook='cd "$1" && mkdir -p usr/bin usr/sbin usr/lib usr/lib64 && ln -s usr/bin usr/sbin usr/lib usr/lib64 .' \
    --include="$comma" trixie "$target" "$root/etc/apt/sources.list"
mkdir -p "$target/proc"
in_target() { (enter "$target" "$@"); }
quietly "$name.log" in_target "$build:/build" "$lab:/lab" -- bash /lab/programs.sh --inside "$name"
rm -rf --one-file-system "$target"
set_stamp "$name" "$key"
say "done in ${SECONDS}s (${made##*/}: $(($(stat -c %s "$made") / 1000000)) MB)"
