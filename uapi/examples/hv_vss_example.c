/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A daemon in one page: registers with /dev/vmbus/hv_vss, prints each request of the host and
 * answers it with success. IT FREEZES NOTHING, so a backup that it answers is not consistent: it
 * shows the interface, no more.
 *
 *     cc -o hv_vss_example hv_vss_example.c && ./hv_vss_example
 *
 * Speaks v2 and falls back to v1 on a kernel that only knows that. The device can be given as
 * argument.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "../hv_vss.h"

/* What a read can return: aligned for every frame. */
union buffer {
	struct hv_vss_registered registered;
	struct hv_vss_request request;
	struct hv_vss_msg msg;
	unsigned char bytes[HV_VSS_MAX_FRAME];
};

static int complain(const char *what)
{
	fprintf(stderr, "hv_vss_example: %s: %s\n", what, strerror(errno));
	return 1;
}

static int write_all(int fd, const void *message, size_t size)
{
	return write(fd, message, size) == (ssize_t)size ? 0 : -1;
}

/* Returns the ABI version in force, or -1. */
static int register_daemon(int fd, union buffer *buffer)
{
	struct hv_vss_register hello;
	struct hv_vss_msg hello_v1;

	memset(&hello, 0, sizeof(hello));
	hello.frame.version = HV_VSS_ABI_V2;
	hello.frame.size = sizeof(hello);
	hello.frame.kind = HV_VSS_FRAME_REGISTER;
	hello.max_version = HV_VSS_ABI_V2;
	if (write_all(fd, &hello, sizeof(hello)) == 0) {
		if (read(fd, buffer, sizeof(*buffer)) < (ssize_t)sizeof(buffer->registered))
			return -1;
		return (int)buffer->registered.abi_version;
	}
	if (errno != EINVAL)
		return -1;

	memset(&hello_v1, 0, sizeof(hello_v1));
	hello_v1.vss_hdr.operation = VSS_OP_REGISTER1;
	if (write_all(fd, &hello_v1, sizeof(hello_v1)) != 0)
		return -1;
	return read(fd, buffer, sizeof(*buffer)) == (ssize_t)sizeof(__u32) ? 1 : -1;
}

static int serve_v1(int fd, union buffer *buffer)
{
	struct hv_vss_msg answer;

	for (;;) {
		if (read(fd, buffer, sizeof(*buffer)) != (ssize_t)sizeof(buffer->msg))
			return complain("read");
		printf("operation %d\n", buffer->msg.vss_hdr.operation);
		fflush(stdout);

		memset(&answer, 0, sizeof(answer));
		answer.error = HV_S_OK;
		if (write_all(fd, &answer, sizeof(answer)) != 0)
			return complain("write");
	}
}

static int serve_v2(int fd, union buffer *buffer)
{
	const struct hv_vss_request *request = &buffer->request;
	const struct hv_vss_freeze_info *info;
	struct hv_vss_answer answer;

	for (;;) {
		ssize_t got = read(fd, buffer, sizeof(*buffer));

		if (got < 0)
			return complain("read");
		if (got < (ssize_t)sizeof(*request) || request->frame.kind != HV_VSS_FRAME_REQUEST)
			continue;
		printf("request %llu: operation %d, %u ms left",
		       (unsigned long long)request->frame.id, request->msg.vss_hdr.operation,
		       (unsigned int)request->time_left_ms);
		if (request->payload_size == sizeof(*info)) {
			info = (const struct hv_vss_freeze_info *)(const void *)(request + 1);
			printf(", backup type %u, %u disks", (unsigned int)info->backup_type,
			       (unsigned int)info->lun_count);
		}
		printf("\n");
		fflush(stdout);

		memset(&answer, 0, sizeof(answer));
		answer.frame.version = HV_VSS_ABI_V2;
		answer.frame.size = sizeof(answer);
		answer.frame.kind = HV_VSS_FRAME_ANSWER;
		answer.frame.id = request->frame.id;
		answer.status = HV_S_OK;
		answer.operation = request->msg.vss_hdr.operation;
		/* ESTALE: our answer was too late, the host has been told so. Go on. */
		if (write_all(fd, &answer, sizeof(answer)) != 0 && errno != ESTALE)
			return complain("write");
	}
}

int main(int argc, char **argv)
{
	static union buffer buffer;
	const char *device = argc > 1 ? argv[1] : "/dev/vmbus/hv_vss";
	int fd = open(device, O_RDWR);
	int abi;

	if (fd < 0)
		return complain(device);
	abi = register_daemon(fd, &buffer);
	if (abi < 0)
		return complain("registration");
	printf("registered, ABI v%d; this example freezes nothing\n", abi);
	fflush(stdout);
	return abi == 1 ? serve_v1(fd, &buffer) : serve_v2(fd, &buffer);
}
