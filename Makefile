# SPDX-License-Identifier: GPL-2.0-only
#
# The front door. Everything that is made goes to build/ and target/; what is there is reused.
# The work is done by cargo, Kbuild and the scripts in tests/lab, each of which says what it does.

DESTDIR ?=
PREFIX ?= /usr
# What 'make install' installs.
MODULE ?= build/hv_vss.ko
DAEMON ?= target/release/hv_vss_daemon
# The kernel release that the module was built for decides where it is installed.
KVER ?= $(shell modinfo -F vermagic $(MODULE) 2>/dev/null | cut -d ' ' -f 1)
# Which end-to-end cases to run: a glob over names such as pairing/ours-ours.
CASE ?= *
# KERNEL=<name> lets the guest under test run another kernel; tests/lab/lib.sh names them.
# What `make test-kernels` runs the module's cases on.
KERNELS ?= 7.3 7.2 testing unstable
# The cases in which it is the module that is tested; also those of our daemon on it in which that is killed or a disk
# hangs.
MODULE_CASES ?= pairing/* lifecycle/* abi/* dialogue/* owned/* hostile/* suspend/* sleep/* deadman/*
# Kernels that do not take the module, on which `make test-kernels` runs the daemon's cases with the
# kernel's own, and which cases those are.
STOCK_KERNELS ?= 6.12 6.1
DAEMON_CASES ?= freeze/* scope/* order/* deadman/* broken/* broken/btrfs-scrub foreign/*
# CLIPPY=1 lints the module with clippy while it is built.
CLIPPY ?=

# The daemon as it is shipped, with its part of libc inside: all that it has is locked in memory, and that is a
# fifth less than with the whole shared one. The lab's own programs as fast to build as they can be.
CARGO_DAEMON = cargo rustc --locked --release --package hv_vss_daemon --bin hv_vss_daemon -- -C target-feature=+crt-static
CARGO_LAB = cargo build --locked --profile lab --workspace --exclude hv_vss_daemon
LAB = tests/lab

.PHONY: all
all: module user ## Build hv_vss.ko and the workspace (default)

.PHONY: packages
packages:
	@GOALS='$(MAKECMDGOALS)' $(LAB)/packages.sh

.PHONY: module
module: packages ## Build build/hv_vss.ko; CLIPPY=1 lints it too
	@$(LAB)/module.sh $(if $(CLIPPY),CLIPPY=$(CLIPPY))

# The module for the kernel of the lab's guest. On Debian it is the one that 'make module' builds.
.PHONY: lab-module
lab-module: packages
	@$(LAB)/module.sh --lab

.PHONY: user
# Both at once: each profile has a folder and a lock of its own, and the end of the daemon's build is of one thread.
user: packages ## Build the daemon, the simulated host and the test tools
	@echo "user: building the workspace with cargo"
	@$(CARGO_DAEMON) & $(CARGO_LAB); status=$$?; wait $$! && exit $$status
	@$(CC) -Wall -Wextra -o target/lab/hv_vss_example uapi/examples/hv_vss_example.c
	@$(CC) -Wall -Wextra -m32 -static -s -o target/lab/hv_vss_example_32 uapi/examples/hv_vss_example.c

.PHONY: images
images: packages
	@$(LAB)/image.sh

.PHONY: demo
demo: lab-module user images ## Back up a stock Debian guest once and print the timeline
	@$(LAB)/run.sh --timeout 600 ./e2e demo

.PHONY: test
test: lint unit-and-wire fuzz-shortly e2e ## Lint, unit and layout tests, a short fuzz run, then the end-to-end cases

# The long cases come last: the tables of tests/RESULTS.md are made of what the last run has left.
.PHONY: test-all
test-all: lint unit-and-wire fuzz test-packages test-databases test-volumes e2e-all ## The same with a longer fuzz run, packages, databases, volumes and the long cases

# On a machine that has none yet the kernel's tree is made beside the first step of a test: it waits for
# the network, and then has one processor. Should that fail, whoever needs it says why. What the later steps need
# is compiled meanwhile, and should that fail, they say so.
TESTS = $(filter test test-all,$(MAKECMDGOALS))
BESIDE = $(if $(TESTS),$(LAB)/kernel.sh &)
MEANWHILE = $(if $(TESTS),cargo test --quiet --locked --workspace --no-run && $(MAKE) --no-print-directory user;)
# What the clippy of Rust 1.85 says and later ones do not any more: where it looks for a SAFETY comment, too.
OLD_CLIPPY = $(if $(filter 1.8%,$(shell rustc --version)),-A clippy::format_collect -A clippy::precedence \
	-A clippy::undocumented_unsafe_blocks)
.PHONY: lint
lint: packages ## cargo fmt --check, clippy on the workspace and on the module
	@cargo fmt --all --check
	@$(BESIDE) cargo clippy --locked --workspace --all-targets -- -D warnings $(OLD_CLIPPY); status=$$?; \
		[ $$status != 0 ] || { $(MEANWHILE) true; }; wait; exit $$status
	@$(LAB)/module.sh CLIPPY=1

.PHONY: unit
unit: packages ## Unit, property and layout tests: no guest needed
	cargo test --locked --workspace

.PHONY: wire
wire: packages ## Compare what the simulated host says on the wire with the kernel's own source
	@$(LAB)/wire.sh
	HV_WIRE_BINDINGS='$(CURDIR)/build/wire.rs' cargo test --locked --package hyperv-sim --test wire

# Both at once: with the bindings the simulated host's tests are built anew.
.PHONY: unit-and-wire
unit-and-wire: packages
	@$(LAB)/wire.sh
	HV_WIRE_BINDINGS='$(CURDIR)/build/wire.rs' cargo test --locked --workspace

# Each case has a limit of its own, which grows with what else this machine has to do, and an outer guest that
# shows no sign of life is ended: this one is for what hangs beside them.
E2E_SECONDS ?= 14400

.PHONY: e2e
e2e: lab-module user images ## Run the end-to-end cases that match CASE=<glob>
	@$(LAB)/e2e.sh --timeout $(E2E_SECONDS) '$(CASE)'

.PHONY: e2e-all
e2e-all: lab-module user images
	@$(LAB)/e2e.sh --timeout $(E2E_SECONDS) --all '$(CASE)'

# LONG=1 has both of these run the long cases as well, which may take as long as a whole run.
LONG ?=
LONG_CASES = $(if $(LONG),--all --timeout $(E2E_SECONDS))

.PHONY: test-kernels
test-kernels: packages user ## Run the module's cases on each kernel in KERNELS, the daemon's on STOCK_KERNELS; LONG=1 the long ones, too
	@for kernel in $(KERNELS); do \
		echo "test-kernels: kernel $$kernel"; \
		KERNEL=$$kernel $(LAB)/module.sh --lab && \
		KERNEL=$$kernel $(LAB)/e2e.sh --timeout 7200 --cpus 2 $(LONG_CASES) $(patsubst %,'%',$(MODULE_CASES)) || exit 1; \
	done
	@for kernel in $(STOCK_KERNELS); do \
		echo "test-kernels: kernel $$kernel with its own module"; \
		KERNEL=$$kernel $(LAB)/e2e.sh --timeout 2400 $(LONG_CASES) $(patsubst %,'%',$(DAEMON_CASES)) || exit 1; \
	done

# KERNEL=debug-kcsan looks for data races instead.
.PHONY: test-debug-kernel
test-debug-kernel: packages user ## Run them on a kernel with KASAN, lockdep, kmemleak and more; LONG=1 likewise
	@KERNEL=$(or $(KERNEL),debug) $(LAB)/module.sh --lab
	@KERNEL=$(or $(KERNEL),debug) $(LAB)/run.sh --timeout 14400 ./e2e run --patience 4 --cpus 2 $(if $(LONG),--all) \
		$(patsubst %,'%',$(MODULE_CASES))

.PHONY: module-arm64
module-arm64: packages ## Cross-build the module for Debian's arm64 kernel; it cannot be run here
	@$(LAB)/arm64.sh

.PHONY: module-configs
module-configs: packages ## Compile the module for kernels that lack sleep, unloading, or modules at all
	@$(LAB)/configurations.sh

.PHONY: e2e-list
e2e-list: packages ## List the end-to-end cases
	@$(CARGO_LAB) --quiet
	@target/lab/e2e list

# Puts build/results/$(1).md where tests/RESULTS.md has its place.
into_results = awk -v name=$(1) 'FNR == NR { table = table $$0 "\n"; next } \
	$$0 == "<!-- end of " name " -->" { skip = 0 } \
	!skip { print } \
	index($$0, "<!-- " name ":") == 1 { printf "%s", table; skip = 1 }' build/results/$(1).md tests/RESULTS.md >build/RESULTS.md && \
	cat build/RESULTS.md >tests/RESULTS.md

# These tables of tests/RESULTS.md are what all runs so far have seen, which tests/e2e/seen.json keeps: the last run
# on each kernel is merged into it.
.PHONY: comparison matrix kernels
comparison: ## Put what the last e2e run saw of the peer into tests/RESULTS.md, beside what earlier ones saw
matrix: ## Put what the last run of matrix/* saw into tests/RESULTS.md, likewise
kernels: ## Put how the last e2e run and 'make test-kernels' went on each kernel into tests/RESULTS.md, likewise
RUNS = $(wildcard build/results/e2e.json build/runs/*/e2e.json)
comparison matrix kernels:
	@$(CARGO_LAB) --quiet
	@target/lab/e2e tables --seen tests/e2e/seen.json $(addprefix --run ,$(RUNS)) --kernels build/kernels \
		--results build/results
	@$(call into_results,$@)

.PHONY: bench
bench: lab-module user images ## Measure ours against the peer; table, plot and JSON in build/bench
	@$(LAB)/run.sh --timeout 7200 --memory 8192 --results build/bench ./bench $(BENCH)
	@git describe --always --dirty >build/bench/commit

.PHONY: figures
figures: ## Put what the last 'make bench' measured into tests/RESULTS.md
	@mkdir -p build/results && { echo; echo "Commit $$(cat build/bench/commit):"; echo; \
	    sed 's/^\(.\)/    \1/' build/bench/table.txt; echo; } >build/results/bench.md
	@$(call into_results,bench)

# Seconds for each of the four fuzz targets.
FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: packages ## Fuzz the engine, FUZZ_SECONDS for each of four targets
	@kmod/engine/fuzz/run.sh $(FUZZ_SECONDS)

.PHONY: fuzz-shortly
fuzz-shortly: packages
	@kmod/engine/fuzz/run.sh 5

# What goes where, for `make install` and for the packages alike: one target per package. Files that
# name paths or the version are adapted on the way.
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
LIB = $(DESTDIR)$(PREFIX)/lib
LIBEXEC = $(DESTDIR)$(PREFIX)/libexec
SHARE = $(DESTDIR)$(PREFIX)/share
ADAPT = sed -e 's|/usr/libexec/|$(PREFIX)/libexec/|g' -e 's|/usr/sbin/|$(PREFIX)/sbin/|g' -e 's|/usr/share/|$(PREFIX)/share/|g' -e 's|^prefix=/usr|prefix=$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|'
# Where zsh looks for what completes a command; packages of Debian have a folder of their own.
ZSH_FUNCTIONS ?= site-functions
# The daemons of the distributions that give way to ours: Debian's and Ubuntu's, Fedora's, SUSE's.
OTHER_DAEMONS = hv-vss-daemon hypervvssd hv_vss_daemon

.PHONY: deb
deb: packages ## Build the Debian packages into build/deb/packages, twice with the same bytes; lintian looks
	@$(LAB)/deb.sh

.PHONY: dkms
dkms: deb ## Install them on a clean Debian and have DKMS build the module there
	@$(LAB)/dkms.sh

# The suites beside trixie, and the cases that its module goes through there.
SUITES ?= testing unstable
SUITES_CASES ?= pairing/* owned/our-daemon owned/closed

.PHONY: test-suites
test-suites: deb user ## Have DKMS build the module on a clean Debian of each of SUITES, and run it there
	@for suite in $(SUITES); do \
		KERNEL=$$suite $(LAB)/dkms.sh && \
		KERNEL=$$suite $(LAB)/run.sh --timeout 1800 --module build/kernels/$$suite/dkms/hv_vss.ko ./e2e run $(patsubst %,'%',$(SUITES_CASES)) || exit 1; \
	done

# Each is called by its full name, since they need what takes a while to build.
PACKAGES_CASES = $(addprefix packages/,page install-to-purge kernel-upgrade kernel-upgrade-unbuilt \
	installed-amid-a-freeze upgraded-amid-a-freeze upgrade-not-configured removed-amid-a-freeze boot no-module disabled masked blacklisted mainline-daemon unknown-key secure-boot)

.PHONY: test-packages
test-packages: dkms lab-module user images ## Install them in a guest, and take backups before and after
	@$(LAB)/programs.sh mariadb
	@$(LAB)/run.sh --timeout 3600 --results build/runs/packages ./e2e run $(PACKAGES_CASES)

# What only a guest with systemd shows: the unit, the rules of udev, the hand-over. They are long cases, so that
# 'make test-all' has them with the others.
SYSTEMD_CASES = $(addprefix systemd/,backup stop stop-amid-hooks daemon-killed both-killed watchdog hook-out-of-memory not-configured) \
	$(addprefix control/,systemctl-reload varlink no-device hand-over-held-open hand-over-held-open-by-udev \
	check-privileges check-next-boot gives-way)

.PHONY: test-systemd
test-systemd: lab-module user images ## Run what only a guest with systemd shows: the unit, udev's rules, the hand-over
	@$(LAB)/run.sh --timeout 2400 --results build/runs/systemd ./e2e run $(SYSTEMD_CASES)

# By their full names, since they need what takes a while to make.
DATABASES_CASES = $(addprefix databases/,mariadb mariadb-without-hook mariadb-killed mariadb-never-thawed \
	mariadb-long-statement postgresql postgresql-without-hook postgresql-killed guest-agent-hook)

.PHONY: test-databases
test-databases: lab-module user images ## Back up MariaDB and PostgreSQL under load, restore them, and kill what can be
	@$(LAB)/programs.sh databases
	@$(LAB)/run.sh --timeout 2400 --results build/runs/databases ./e2e run $(DATABASES_CASES)

VOLUMES_CASES = $(addprefix volumes/,lvm md luks under-fio)

.PHONY: test-volumes
test-volumes: lab-module user images ## Back up LVM, md and LUKS under load and fio, and restore every copy
	@$(LAB)/programs.sh volumes
	@$(LAB)/run.sh --timeout 3600 --results build/runs/volumes ./e2e run $(VOLUMES_CASES)

.PHONY: install
install: install-module install-daemon install-dev ## Install module, daemon and header below DESTDIR
	@[ -n "$(DESTDIR)" ] || { depmod $(KVER) && $(NEXT); }

# It starts and stops nothing: that is the administrator's.
NEXT = printf '%s\n' 'Installed, and nothing is started. To serve from now on and after each boot:' \
	'  systemctl daemon-reload && udevadm control --reload && systemctl enable hv_vss' \
	'  systemctl stop NAME, if the distribution has a daemon that runs: $(OTHER_DAEMONS)' \
	'  $(PREFIX)/libexec/hv_vss_hand_over take && udevadm trigger --subsystem-match=misc' \
	'  systemctl start hv_vss && $(PREFIX)/sbin/hv_vss check'

.PHONY: install-module
install-module:
	@[ -n "$(KVER)" ] || { echo "install: nothing is built; run 'make' first" >&2; exit 1; }
	install -D -m 0644 $(MODULE) $(DESTDIR)/lib/modules/$(KVER)/updates/hv_vss.ko

.PHONY: install-daemon
install-daemon:
	install -D -m 0755 $(DAEMON) $(LIBEXEC)/hv_vss_daemon
	install -D -m 0755 kmod/hand-over/hv_vss_hand_over $(LIBEXEC)/hv_vss_hand_over
	install -d $(DESTDIR)$(PREFIX)/sbin
	ln -sf ../libexec/hv_vss_daemon $(DESTDIR)$(PREFIX)/sbin/hv_vss
	install -D -m 0644 kmod/hand-over/hv_vss.conf $(LIB)/modprobe.d/hv_vss.conf
	install -d $(LIB)/udev/rules.d $(LIB)/systemd/system
	$(ADAPT) kmod/hand-over/60-hv_vss-hand-over.rules >$(LIB)/udev/rules.d/60-hv_vss-hand-over.rules
	install -m 0644 daemon/90-hv_vss.rules $(LIB)/udev/rules.d/90-hv_vss.rules
	$(ADAPT) daemon/hv_vss.service >$(LIB)/systemd/system/hv_vss.service
	for name in $(OTHER_DAEMONS); do \
		install -D -m 0644 daemon/give-way.conf $(LIB)/systemd/system/$$name.service.d/hv_vss.conf || exit 1; \
	done
	install -d $(SHARE)/man/man8
	$(ADAPT) daemon/hv_vss_daemon.8 >$(SHARE)/man/man8/hv_vss_daemon.8
	ln -sf hv_vss_daemon.8 $(SHARE)/man/man8/hv_vss.8
	install -D -m 0644 daemon/hv_vss.toml.5 $(SHARE)/man/man5/hv_vss.toml.5
	ln -sf hv_vss.toml.5 $(SHARE)/man/man5/hv_vss_daemon.toml.5
	install -D -m 0644 daemon/completions/hv_vss.bash $(SHARE)/bash-completion/completions/hv_vss
	install -D -m 0644 daemon/completions/_hv_vss $(SHARE)/zsh/$(ZSH_FUNCTIONS)/_hv_vss
	install -D -m 0644 daemon/completions/hv_vss.fish $(SHARE)/fish/vendor_completions.d/hv_vss.fish
	install -D -m 0755 -t $(SHARE)/hv_vss/hooks daemon/hooks/*
	install -d $(DESTDIR)/etc/hv_vss/hooks.d
	install -d $(DESTDIR)/etc/hv_vss/daemon.toml.d
	[ -e $(DESTDIR)/etc/hv_vss/daemon.toml ] || \
		install -m 0644 daemon/hv_vss_daemon.toml $(DESTDIR)/etc/hv_vss/daemon.toml

# The module's source, for DKMS.
DKMS_SOURCE = $(DESTDIR)$(PREFIX)/src/hv_vss-$(VERSION)
.PHONY: install-dkms
install-dkms:
	for file in Kbuild $$(find kmod -name '*.[ch]' -o -name '*.rs' | grep -v '^kmod/engine/\(fuzz\|tests\)/'); do \
		install -D -m 0644 $$file $(DKMS_SOURCE)/$$file || exit 1; \
	done
	install -D -m 0644 -t $(DKMS_SOURCE)/kmod/dkms kmod/dkms/kernel.sh
	$(ADAPT) kmod/dkms/build >$(DKMS_SOURCE)/kmod/dkms/build
	chmod 0755 $(DKMS_SOURCE)/kmod/dkms/build
	install -D -m 0755 -t $(DKMS_SOURCE)/kmod/dkms kmod/dkms/prepare kmod/dkms/forget
	install -D -m 0644 -t $(DKMS_SOURCE)/uapi uapi/hv_vss.rs
	sed 's|#MODULE_VERSION#|$(VERSION)|' kmod/dkms/dkms.conf >$(DKMS_SOURCE)/dkms.conf

.PHONY: install-dev
install-dev:
	install -D -m 0644 uapi/hv_vss.h $(DESTDIR)$(PREFIX)/include/hv_vss/hv_vss.h
	install -d $(SHARE)/man/man4
	$(ADAPT) uapi/hv_vss.4 >$(SHARE)/man/man4/hv_vss.4
	install -d $(SHARE)/pkgconfig $(SHARE)/doc/hv-vss-dev/examples
	$(ADAPT) uapi/hv-vss.pc >$(SHARE)/pkgconfig/hv-vss.pc
	sed -e 's|"../hv_vss.h"|<hv_vss.h>|' -e 's|cc -o|cc $$(pkg-config --cflags hv-vss) -o|' \
		uapi/examples/hv_vss_example.c >$(SHARE)/doc/hv-vss-dev/examples/hv_vss_example.c

.PHONY: clean
clean: ## Remove all that was built, the build root included
	rm -rf build target

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
