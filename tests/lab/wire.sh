#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/wire.rs: what travels between a guest and its host as the stock kernel defines it (wire.h),
# in Rust. tests/host/tests/wire.rs compares the simulated host with it.
set -euo pipefail
# Always the default kernel: the wire does not depend on which one a guest runs.
unset KERNEL
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

# Structures and numbers by their names; what they consist of comes along. Of the ring's header only its
# bits: they have an alignment, with which Rust packs no structure (see wire.h).
items=(
    --allowlist-type 'vmbus_channel_message_(header|type)|vmbus_channel_(initiate_contact|version_response)'
    --allowlist-type 'vmbus_channel_(offer_channel|rescind_offer|relid_released|modifychannel(_response)?)'
    --allowlist-type 'vmbus_channel_(open_channel|open_result|close_channel)'
    --allowlist-type 'vmbus_channel_gpadl_(header|body|created|teardown|torndown)|gpa_range|vmdata_gpa_direct'
    --allowlist-type 'hv_ring_buffer__bindgen.*|vmpacket_descriptor|vmbus_packet_type'
    --allowlist-type 'vmbuspipe_hdr|icmsg_hdr|icmsg_negotiate|ic_version'
    --allowlist-type 'hv_vss_(hdr|msg|op)|(shutdown|heartbeat)_msg_data|ictimesync_data'
    --allowlist-type 'vstor_packet(_operation)?|storvsc_request_type|sam_status'
    --allowlist-type 'dm_(header|message_type|version_re.*|capabilities(_resp_msg)?|status|(un)?balloon(_re.*)?)'
    --allowlist-var 'HV_MESSAGE_PAYLOAD_BYTE_COUNT|VMBUS_(MESSAGE|PIPE)_.*|VMBUS_CHANNEL_NAMED_PIPE_MODE'
    --allowlist-var 'UTIL_.*FW_VERSION|ICMSG(TYPE|HDRFLAG)_.*|HV_(S|E|ERROR)_.*'
    --allowlist-var 'VSS_HBU_NO_AUTO_RECOVERY|ICTIMESYNCFLAG_.*|WLTIMEDELTA'
    --allowlist-var 'REQUEST_COMPLETION_FLAG|SRB_STATUS_.*|DYNMEM_PROTOCOL_VERSION_WIN10'
    --allowlist-var 'NT_STATUS_(INVALID_(PARAMETER|DEVICE_STATE)|REVISION_MISMATCH|DEVICE_DOES_NOT_EXIST)'
    --allowlist-var 'NT_STATUS_(CANCELLED|IO_DEVICE_ERROR)'
    --allowlist-var 'WIRE_.*'
)
# bindgen's own layout tests stay in: they hold its Rust against what clang makes of the C.
options=(--no-prepend-enum-name --no-doc-comments --no-derive-debug)
# Of the kernel's flags those that decide what its headers say; the others are about code.
flags=(
    -nostdinc -I/linux/arch/x86/include -I/linux/arch/x86/include/generated -I/linux/include
    -I/linux/arch/x86/include/uapi -I/linux/arch/x86/include/generated/uapi
    -I/linux/include/uapi -I/linux/include/generated/uapi
    -include /linux/include/linux/compiler-version.h -include /linux/include/linux/kconfig.h
    -include /linux/include/linux/compiler_types.h
    # what wire.h names by its place in the source
    -I/linux -I/build/wire.source -I/linux/drivers/hv
    -D__KERNEL__ -D__BINDGEN__ -DMODULE -DCC_USING_FENTRY
    '-DKBUILD_BASENAME="wire"' '-DKBUILD_MODNAME="wire"' -D__KBUILD_MODNAME=wire
    -std=gnu11 -fms-extensions -fshort-wchar -funsigned-char -fno-builtin --target=x86_64-linux-gnu -w
)

"$lab/kernel.sh"
key=$(key_of "$(cat "$build/stamps/kernel" "$lab/wire.h" "$lab/wire.sh")")
begin wire "$build/wire.rs" "$key" "making the bindings of the wire"
say "making the bindings of the wire"
source=$build/wire.source
rm -rf "$source"
mkdir -p "$source"
# The prepared tree is without the drivers' code.
packed=$(basename "$unpacked"/usr/src/linux-source-*.tar.xz)
quietly wire.log in_root "$unpacked/usr/src:/packed" "$build:/build" -- tar --extract --file "/packed/$packed" \
    --directory /build/wire.source --strip-components 1 --occurrence=1 \
    "${packed%.tar.xz}/drivers/scsi/storvsc_drv.c" "${packed%.tar.xz}/drivers/hv/hv_balloon.c"
# Only one of two drivers in one source can have itself registered, by names that all have.
sed -i '/^static const struct hv_vmbus_device_id id_table/,$d' "$source/drivers/hv/hv_balloon.c"
quietly wire.log in_root "$choice/linux:/linux" "$build:/build" "$lab:/lab" -- \
    bindgen /lab/wire.h "${options[@]}" "${items[@]}" --output /build/wire.rs.new -- "${flags[@]}"
rm -rf "$source"
mv "$build/wire.rs.new" "$build/wire.rs"
set_stamp wire "$key"
say "done in ${SECONDS}s"
