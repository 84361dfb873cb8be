#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Builds the Debian packages into build/deb/packages, with Debian's own tools in a root of their own
# (trixie), from the crates in Cargo.lock. They are built twice, in folders of different names, and refused
# if a byte differs, if the list of what the daemon is made of is not that, or if lintian has something to say.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

deb_root=$build/deb.root
out=$build/deb
sources=(Kbuild Makefile Cargo.toml Cargo.lock COPYING .debian daemon kmod uapi tests)
packages=(build-essential cargo cargo-auditable debhelper dh-dkms fakeroot jq lintian rustc)
options=(
    --variant=apt --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"'
)

in_deb_root() { (enter "$deb_root" "$@"); }

# make_root: runs once; afterwards the root is there.
make_root() (
    key=$(key_of "${packages[@]}" "${options[@]}" "$(cat "$build/stamps/root")")
    begin deb-root "$deb_root" "$key" "making the root that packages are built in"
    say "making the root that packages are built in"
    rm -rf --one-file-system "$deb_root"
    comma=$(IFS=,; printf '%s' "${packages[*]}")
    # From where, and how it is reached, is what the build root was made with.
    quietly deb-root.log mmdebstrap "${options[@]}" --aptopt="$root/etc/apt/apt.conf.d/99mmdebstrap" \
        --include="$comma" trixie "$deb_root" "$root/etc/apt/sources.list"
    set_stamp deb-root "$key"
)

# make_crates: the crates' sources, for a build without a network.
make_crates() (
    key=$(key_of "$(cat "$repo/Cargo.lock")")
    begin crates "$build/crates" "$key" "fetching the crates"
    rm -rf "$build/crates"
    quietly crates.log cargo vendor --locked --manifest-path "$repo/Cargo.toml" "$build/crates"
    set_stamp crates "$key"
)

# make_packages FOLDER: builds them in $out/FOLDER/source; they are in $out/FOLDER then.
make_packages() {
    local folder=$out/$1
    rm -rf "$folder"
    mkdir -p "$folder/source/.cargo"
    tar -C "$folder/source" -xf "$out/source.tar"
    mv "$folder/source/.debian" "$folder/source/debian"
    cat >"$folder/source/.cargo/config.toml" <<'END'
[source.crates-io]
replace-with = "crates"
[source.crates]
directory = "/crates"
END
    quietly "deb-$1.log" in_deb_root "$folder:/$1" "$build/crates:/crates" -- \
        env --chdir "/$1/source" CARGO_HOME=/tmp/cargo-"$1" \
        dpkg-buildpackage --build=binary --no-sign --no-pre-clean
    rm -rf "$folder/source"
}

# check_sbom: refuses the daemon's package if a part of it has no name, version or licence in its list, if the crates
# there are not those that cargo knows of, or if what else is linked into it is not what the package says.
check_sbom() {
    local listed wanted
    # shellcheck disable=SC2016  # the inner shell expands these
    listed=$(in_deb_root "$out/first:/first" -- bash -euo pipefail -c '
        deb=$(echo /first/hv-vss-daemon_*.deb)
        dpkg-deb --fsys-tarfile "$deb" | tar -xO ./usr/share/doc/hv-vss-daemon/sbom.cdx.json.gz | gzip -d >/tmp/sbom
        dpkg-deb --field "$deb" Static-Built-Using | jq --raw-output --raw-input --slurp --slurpfile sbom /tmp/sbom '\''
            def is_said: type == "string" and . != "";
            def of($kind): map(select(.purl | startswith("pkg:" + $kind + "/")));
            $sbom[0].components as $all | ($all | of("deb") | map("\(.name) (= \(.version))")) as $linked
            | if $all == [] or ([ $all[] | .name, .version, .licenses[0].expression ] | all(is_said) | not) then
                error("a part has no name, no version or no licence")
            elif $linked == [] or (gsub("\\s+"; " ") | rtrimstr(" ")) != ($linked | join(", ")) then
                error("Static-Built-Using has \(.), and the list \($linked)")
            else $all | of("cargo")[] | "\(.name) v\(.version)" end'\''
    ') || die "refused: the list of what the daemon is made of"
    wanted=$(cd "$repo" && cargo tree --locked --package hv_vss_daemon --edges normal,build --prefix none --format '{p}')
    wanted=$(awk '$1 != "hv_vss_daemon" { print $1, $2 }' <<<"$wanted" | sort -u)
    diff <(printf '%s\n' "$wanted") <(printf '%s\n' "$listed" | sort -u) ||
        die "refused: the crates in the list of what the daemon is made of are not those of Cargo.lock"
}

"$lab/root.sh"
make_root
make_crates
key=$(key_of "$(cat "$build/stamps/deb-root" "$lab/deb.sh")" \
    "$(cd "$repo" && find "${sources[@]}" -path '*/fuzz/target' -prune -o -path tests -prune -o -type f -print0 | sort -z | xargs -0 sha256sum)")
begin deb "$out/packages" "$key" "building the packages"
say "building the packages"
mkdir -p "$out"
# Once for both: the sources may be worked on meanwhile.
tar -C "$repo" --exclude ./kmod/engine/fuzz/target -cf "$out/source.tar" "${sources[@]/#/./}"
make_packages first &
make_packages once-again &
failed=
for run in $(jobs -p); do wait "$run" || failed=1; done
[ -z "$failed" ] || exit 1
for deb in "$out"/first/*.deb; do
    cmp "$deb" "$out/once-again/${deb##*/}" || die "refused: built twice, ${deb##*/} differs"
done
check_sbom
quietly lintian.log in_deb_root "$out/first:/first" -- sh -c 'lintian --fail-on error,warning --info /first/*.changes'
rm -rf "$out/packages"
mkdir "$out/packages"
mv "$out"/first/*.deb "$out/packages/"
rm -rf "$out/first" "$out/once-again" "$out/source.tar"
set_stamp deb "$key"
say "done in ${SECONDS}s: $(cd "$out/packages" && echo ./*.deb)"
