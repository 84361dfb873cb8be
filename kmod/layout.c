// SPDX-License-Identifier: GPL-2.0
/*
 * Where the kernel's compiler puts things: made into constants in layout.h, as the kernel does for its
 * assembler, so that vmbus.rs can compare. Never linked.
 */
#include <linux/hyperv.h>
#include <linux/kbuild.h>

void hv_vss_layout(void);

void hv_vss_layout(void)
{
	DEFINE(HV_VSS_SIZE_DRIVER, sizeof(struct hv_driver));
	OFFSET(HV_VSS_DRIVER_NAME, hv_driver, name);
	OFFSET(HV_VSS_DRIVER_ID_TABLE, hv_driver, id_table);
	OFFSET(HV_VSS_DRIVER_DRIVER, hv_driver, driver);
	OFFSET(HV_VSS_DRIVER_PROBE, hv_driver, probe);
	OFFSET(HV_VSS_DRIVER_REMOVE, hv_driver, remove);
	OFFSET(HV_VSS_DRIVER_SUSPEND, hv_driver, suspend);
	OFFSET(HV_VSS_DRIVER_RESUME, hv_driver, resume);

	DEFINE(HV_VSS_SIZE_DEVICE, sizeof(struct hv_device));
	OFFSET(HV_VSS_DEVICE_DEV_TYPE, hv_device, dev_type);
	OFFSET(HV_VSS_DEVICE_DEVICE, hv_device, device);
	OFFSET(HV_VSS_DEVICE_CHANNEL, hv_device, channel);

	DEFINE(HV_VSS_SIZE_DEVICE_ID, sizeof(struct hv_vmbus_device_id));
	OFFSET(HV_VSS_DEVICE_ID_GUID, hv_vmbus_device_id, guid);
}
