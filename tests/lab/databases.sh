#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/databases.cpio, which is put over the guest under test: the servers of MariaDB and PostgreSQL
# as Debian packages them, with what they are linked with, a fresh data folder of each (/srv/mariadb,
# /srv/postgresql), and those of their surroundings that busybox has in another form. Made when asked for;
# only databases/* want it.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

packages=(
    mariadb-server-core mariadb-client-core postgresql-17
    # what their set-up is done with
    bash coreutils cpio dash findutils grep hostname mawk sed util-linux
)
options=(
    # Unpacked and not configured: nothing here starts as a service.
    --variant=extract --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*'
    --aptopt='APT::Install-Recommends "false"'
)
postgresql=/usr/lib/postgresql/17
programs=(
    /usr/sbin/mariadbd /usr/bin/{mariadb,psql}
    "$postgresql"/bin/{postgres,pg_amcheck,pg_controldata}
    # busybox's have other options
    /usr/bin/{mkfifo,setpriv,sleep,timeout}
)
folders=(/usr/share/mariadb/{charsets,english} "$postgresql"/lib /usr/share/postgresql/17 /srv)

# The part below runs in the root with the servers, with build/ at /build.
if [ "${1:-}" = --inside ]; then
    printf '%s\n' root:x:0:0:root:/root:/bin/sh mysql:x:101:101::/nonexistent:/bin/false \
        postgres:x:102:102::/srv/postgresql:/bin/sh >/etc/passwd
    printf '%s\n' root:x:0: mysql:x:101: postgres:x:102: >/etc/group
    mkdir -p /srv/{mariadb,postgresql}
    chown mysql: /srv/mariadb
    chown postgres: /srv/postgresql
    # As small as they can be: they are copied to a disk by an emulated processor. PostgreSQL knows GMT by
    # itself.
    TZ=GMT setpriv --reuid postgres --regid postgres --clear-groups "$postgresql/bin/initdb" \
        -D /srv/postgresql --no-sync --locale=C --encoding=UTF8 --auth-local=peer --auth-host=reject --wal-segsize=1
    mariadb-install-db --no-defaults --user=mysql --datadir=/srv/mariadb --skip-test-db --force \
        --auth-root-authentication-method=socket --innodb-log-file-size=4M \
        --innodb-data-file-path=ibdata1:4M:autoextend --innodb-autoextend-increment=1
    # Instead of Debian's wrapper, which is in Perl.
    ln -sf "$postgresql/bin/psql" /usr/bin/psql
    rm -r "$postgresql"/lib/{llvmjit*,bitcode,pgxs}
    {
        printf '%s\n' /etc/{passwd,group} "${programs[@]}"
        ldd "${programs[@]}" "$postgresql"/lib/*.so | sed -n 's/^\t\(.* => \)\?\(\/[^ ]*\) (.*/\2/p'
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
    sort -u /tmp/files /tmp/targets | cpio --quiet -o -H newc >/build/databases.cpio.new
    mv /build/databases.cpio.new /build/databases.cpio
    exit 0
fi

"$lab/root.sh"
key=$(key_of "$(cat "$build/stamps/root" "$lab/databases.sh")")
begin databases "$build/databases.cpio" "$key" "making the databases' programs"
say "making the databases' programs (Debian trixie: ${packages[*]:0:3})"
target=$build/databases.root
rm -rf --one-file-system "$target"
comma=$(IFS=,; printf '%s' "${packages[*]}")
# From where, and how it is reached, is what the build root was made with.
quietly databases.log mmdebstrap "${options[@]}" --aptopt="$root/etc/apt/apt.conf.d/99mmdebstrap" \
    --setup-hook='cd "$1" && mkdir -p usr/bin usr/sbin usr/lib usr/lib64 && ln -s usr/bin usr/sbin usr/lib usr/lib64 .' \
    --include="$comma" trixie "$target" "$root/etc/apt/sources.list"
mkdir -p "$target/proc"
in_target() { (enter "$target" "$@"); }
quietly databases.log in_target "$build:/build" "$lab:/lab" -- bash /lab/databases.sh --inside
rm -rf --one-file-system "$target"
set_stamp databases "$key"
say "done in ${SECONDS}s (databases.cpio: $(($(stat -c %s "$build/databases.cpio") / 1000000)) MB)"
