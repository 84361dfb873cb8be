# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What a kernel's build says of itself, and its source: for whoever builds the module or prepares a tree
# to build it in. Sourced, never run; knows nothing of DKMS and nothing of the lab.

# option CONFIG NAME: the value of an option of a kernel, without quotes.
option() { sed -n "s/^$2=//p" "$1" | tr -d '"'; }

# compiler_of CONFIG: the C compiler of a kernel, by the name that it was called by.
compiler_of() {
    if [ "$(option "$1" CONFIG_CC_IS_CLANG)" = y ]; then
        echo clang
    else
        option "$1" CONFIG_CC_VERSION_TEXT | cut -d ' ' -f 1
    fi
}

# metadata_rustc RMETA: the compiler that wrote Rust metadata, by its own word in there: byte 16 is the
# length of the text that follows (rustc_metadata: METADATA_HEADER, the root's position, the version).
metadata_rustc() {
    local length
    length=$(od --address-radix=n --format=u1 --skip-bytes=16 --read-bytes=1 "$1")
    dd if="$1" bs=1 skip=17 count="$((length))" status=none
}

# config_diff STOCK BUILT: one line per option that differs and matters. Left out are the names a
# build gives itself: the compiler's text (its version numbers stay in), salt, suffix, and how it
# signs.
config_diff() {
    awk '
        /^# CONFIG_[A-Za-z0-9_]+ is not set$/ { name = $2; value = "n" }
        /^CONFIG_/ { name = substr($0, 1, index($0, "=") - 1); value = substr($0, index($0, "=") + 1) }
        !/^(# )?CONFIG_/ { next }
        name ~ /^CONFIG_(CC_VERSION_TEXT|LOCALVERSION|BUILD_SALT|SYSTEM_[A-Z_]*_KEYS)$/ { next }
        name ~ /^CONFIG_(MODULE_SIG_ALL|MODULE_SIG_KEY[A-Z0-9_]*|OPENSSL_SUPPORTS_ML_DSA)$/ { next }
        FNR == NR { stock[name] = value; next }
        { built[name] = value }
        END {
            for (name in stock) seen[name]
            for (name in built) seen[name]
            for (name in seen) {
                # An option whose dependencies are missing is not listed; to the code it is off.
                s = name in stock ? stock[name] : "n"
                b = name in built ? built[name] : "n"
                if (s != b) print name ": the kernel has " s ", this build " b
            }
        }' "$1" "$2" | sort
}

# extract_source ARCHIVE TARGET [PATTERN]...: a kernel's source without what no build for this machine
# reads, and without these.
extract_source() {
    local archive=$1 target=$2 name arch pattern excludes=()
    shift 2
    name=$(basename "${archive%.tar.*}")
    # The letter that this machine's folder in arch/ begins with.
    case $(uname -m) in
    x86_64) arch=x ;;
    *) arch=a ;;
    esac
    for pattern in "arch/[!$arch]*.[chS]" "arch/[!$arch]*.dts*" 'Documentation/*/*' 'tools/testing/*' 'sound/*.c' "$@"; do
        excludes+=(--exclude "$name/$pattern")
    done
    mkdir -p "$target"
    tar --extract --file "$archive" --directory "$target" --strip-components 1 "${excludes[@]}"
}
