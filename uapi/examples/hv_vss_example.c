/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A daemon in a few pages: registers with /dev/vmbus/hv_vss, prints each request of the host, and
 * has the kernel freeze the file systems of the given paths from FREEZE to THAW.
 *
 *     cc -o hv_vss_example hv_vss_example.c && ./hv_vss_example [-d DEVICE] PATH...
 *
 * It shows the interface, no more: the backup is consistent for the given file systems only, and a
 * program that runs while they are frozen must not wait for them, not even to write a log.
 *
 * Where the kernel cannot hold a freeze (v1, or v2 without HV_VSS_FEATURE_HOLD) it says so and fails
 * each FREEZE, because a success would be a lie.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "../hv_vss.h"

/* How long anything is held at the most, whatever becomes of this program and of the host. */
#define HOLD_MS	60000

/* What a read can return; a newer kernel's frames may be longer. */
union message {
	struct hv_vss_frame frame;
	struct hv_vss_registered registered;
	struct hv_vss_request request;
	struct hv_vss_thawed thawed;
	struct hv_vss_msg v1;
	__u32 reply_v1;
};

struct daemon {
	int device;
	int abi;		/* 1 or 2 */
	int can_hold;
	__u64 frozen;		/* the last FREEZE that was read */
	int *targets;		/* a descriptor for each path */
	unsigned int count;
	union message *message;	/* what was read last */
	size_t room;		/* its size in bytes */
};

static int complain(const char *what)
{
	fprintf(stderr, "hv_vss_example: %s: %s\n", what, strerror(errno));
	return -1;
}

static int write_all(int fd, const void *message, size_t size)
{
	return write(fd, message, size) == (ssize_t)size ? 0 : -1;
}

/* Opens the paths; closed again by the kernel when the program ends. */
static int open_targets(struct daemon *d, char **paths, int count)
{
	d->targets = (int *)calloc((size_t)count, sizeof(*d->targets));
	if (!d->targets)
		return complain("memory");
	for (d->count = 0; d->count < (unsigned int)count; d->count++) {
		const char *path = paths[d->count];

		d->targets[d->count] = open(path, O_RDONLY | O_NONBLOCK);
		if (d->targets[d->count] < 0)
			return complain(path);
	}
	return 0;
}

static int register_v1(struct daemon *d)
{
	struct hv_vss_msg hello;

	memset(&hello, 0, sizeof(hello));
	hello.vss_hdr.operation = VSS_OP_REGISTER1;
	if (write_all(d->device, &hello, sizeof(hello)) != 0)
		return -1;
	if (read(d->device, d->message, d->room) != (ssize_t)sizeof(d->message->reply_v1))
		return -1;
	d->abi = 1;
	return 0;
}

/* Registers as v2, or as v1 with a kernel that only knows that. */
static int register_daemon(struct daemon *d)
{
	struct hv_vss_register hello;
	struct hv_vss_registered *reply;
	ssize_t got;

	memset(&hello, 0, sizeof(hello));
	hello.frame.version = HV_VSS_ABI_V2;
	hello.frame.size = sizeof(hello);
	hello.frame.kind = HV_VSS_FRAME_REGISTER;
	hello.max_version = HV_VSS_ABI_V2;
	if (write_all(d->device, &hello, sizeof(hello)) != 0)
		return errno == EINVAL ? register_v1(d) : -1;

	got = read(d->device, d->message, d->room);
	reply = &d->message->registered;
	if (got < (ssize_t)sizeof(*reply) || reply->frame.kind != HV_VSS_FRAME_REGISTERED)
		return -1;
	d->abi = (int)reply->abi_version;
	d->can_hold = (reply->features & HV_VSS_FEATURE_HOLD) && reply->max_held >= d->count;
	if (reply->max_frame > d->room) {
		size_t room = reply->max_frame;
		union message *longer = (union message *)realloc(d->message, room);

		if (!longer)
			return -1;
		d->message = longer;
		d->room = room;
	}
	return 0;
}

/* Thaws all that is held for that FREEZE; 0 also when nothing is. */
static int thaw(struct daemon *d, __u64 id)
{
	struct hv_vss_ioc_thaw all;

	memset(&all, 0, sizeof(all));
	all.id = id;
	all.fd = -1;
	if (d->can_hold && ioctl(d->device, HV_VSS_IOC_THAW, &all) != 0)
		return complain("thaw");
	return 0;
}

static int freeze(struct daemon *d, __u64 id)
{
	unsigned int i;
	int why;

	if (!d->can_hold)
		return -1;
	for (i = 0; i < d->count; i++) {
		struct hv_vss_ioc_freeze target;

		memset(&target, 0, sizeof(target));
		target.id = id;
		target.fd = d->targets[i];
		target.deadline_ms = HOLD_MS;
		target.count = d->count;
		/* EBUSY: two of the paths are on one file system. (Or another one holds it.) */
		if (ioctl(d->device, HV_VSS_IOC_FREEZE, &target) == 0)
			continue;
		why = errno;
		thaw(d, id);
		errno = why;
		return complain("freeze");
	}
	return 0;
}

/* Does what is asked and returns the status for the host. */
static __u32 serve(struct daemon *d, int operation, __u64 id)
{
	switch (operation) {
	case VSS_OP_HOT_BACKUP:
		return HV_S_OK;
	case VSS_OP_FREEZE:
		d->frozen = id;
		return freeze(d, id) == 0 ? HV_S_OK : HV_E_FAIL;
	case VSS_OP_THAW:
		return thaw(d, d->frozen) == 0 ? HV_S_OK : HV_E_FAIL;
	default:
		return HV_E_FAIL;
	}
}

static int next_v1(struct daemon *d)
{
	struct hv_vss_msg answer;
	int operation;
	ssize_t got = read(d->device, d->message, d->room);

	if (got != (ssize_t)sizeof(d->message->v1))
		return complain("read");
	operation = d->message->v1.vss_hdr.operation;
	memset(&answer, 0, sizeof(answer));
	answer.error = serve(d, operation, 0);
	printf("operation %d: answered 0x%x\n", operation, (unsigned int)answer.error);
	if (write_all(d->device, &answer, sizeof(answer)) != 0)
		return complain("write");
	return 0;
}

static void print_request(const struct hv_vss_request *request)
{
	const char *payload = (const char *)request + request->fixed_size;
	struct hv_vss_freeze_info info;

	printf("request %llu: operation %d, %u ms left", (unsigned long long)request->frame.id,
	       request->msg.vss_hdr.operation, (unsigned int)request->time_left_ms);
	if (request->payload_size >= sizeof(info)) {
		memcpy(&info, payload, sizeof(info));
		/* Little-endian, as the host sent them; so are the machines that this runs on. */
		printf(", backup type %u, %u disks", (unsigned int)info.backup_type,
		       (unsigned int)info.lun_count);
	}
	printf("\n");
}

static int answer_request(struct daemon *d)
{
	const struct hv_vss_request *request = &d->message->request;
	struct hv_vss_answer answer;

	/* Printed before, not while anything is frozen. */
	print_request(request);
	fflush(stdout);

	memset(&answer, 0, sizeof(answer));
	answer.frame.version = HV_VSS_ABI_V2;
	answer.frame.size = sizeof(answer);
	answer.frame.kind = HV_VSS_FRAME_ANSWER;
	answer.frame.id = request->frame.id;
	answer.operation = request->msg.vss_hdr.operation;
	answer.status = serve(d, request->msg.vss_hdr.operation, request->frame.id);
	if (write_all(d->device, &answer, sizeof(answer)) == 0)
		return 0;
	if (errno != ESTALE)
		return complain("write");
	/* Too late, the host has been told so; and what was held has been thawed. */
	return 0;
}

static int next_v2(struct daemon *d)
{
	ssize_t got = read(d->device, d->message, d->room);

	if (got < 0)
		return complain("read");
	if (got < (ssize_t)sizeof(d->message->frame))
		return 0;
	switch (d->message->frame.kind) {
	case HV_VSS_FRAME_REQUEST:
		return answer_request(d);
	case HV_VSS_FRAME_THAWED:
		printf("request %llu: thawed early, reason %u\n",
		       (unsigned long long)d->message->frame.id,
		       (unsigned int)d->message->thawed.reason);
		fflush(stdout);
		return 0;
	default:
		return 0;
	}
}

int main(int argc, char **argv)
{
	const char *device = "/dev/vmbus/hv_vss";
	struct daemon d;
	int first = 1;

	memset(&d, 0, sizeof(d));
	if (argc > 2 && strcmp(argv[1], "-d") == 0) {
		device = argv[2];
		first = 3;
	}
	if (argc <= first) {
		fprintf(stderr, "usage: %s [-d DEVICE] PATH...\n", argv[0]);
		return 2;
	}
	/* A crash must end in a close at once, and not in a core dump, which may be on what is held. */
	if (prctl(PR_SET_DUMPABLE, 0UL, 0UL, 0UL, 0UL) != 0) {
		complain("no core dumps");
		return 1;
	}
	if (open_targets(&d, argv + first, argc - first) != 0)
		return 1;

	d.room = HV_VSS_MAX_FRAME;
	d.message = (union message *)malloc(d.room);
	d.device = open(device, O_RDWR);
	if (!d.message || d.device < 0) {
		complain(device);
		return 1;
	}
	if (register_daemon(&d) != 0) {
		complain("registration");
		return 1;
	}
	if (d.can_hold)
		printf("registered, ABI v%d: holds %u file systems from FREEZE to THAW\n", d.abi, d.count);
	else
		printf("registered, ABI v%d: this kernel does not hold freezes, or not so many; "
		       "every FREEZE is failed\n", d.abi);
	fflush(stdout);

	while ((d.abi == 1 ? next_v1(&d) : next_v2(&d)) == 0)
		;
	return 1;
}
