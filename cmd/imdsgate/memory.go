package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// How much garbage may gather on top of what lives, in per cent. On a full node 6 MiB live; Go's default of 100 would double
// that. With 50 the collector runs twice as often, about 15 times a second at 20,000 requests a second, a millisecond each.
// During the start less is better still: what lives long then lies close together. The environment variable GOGC overrules.
const (
	gcPercentStart = 20
	gcPercent      = 50
)

// keepSmall is a task that keeps resident memory to what serving needs. The start touches most of the program, reads all pods
// of the node and opens a watch for each service account. When that is over, and once more when the first credentials have
// come, what it needed is given back: a full node's daemon has 29 MB then, not 54.
func (d *daemon) keepSmall(ctx context.Context) error {
	tuned := os.Getenv("GOGC") == ""
	if tuned {
		debug.SetGCPercent(gcPercentStart)
	}
	if err := d.pods.WaitSynced(ctx); err != nil {
		return ctx.Err()
	}
	for _, pause := range []time.Duration{2 * time.Second, 28 * time.Second} {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		debug.FreeOSMemory()
		if err := releaseProgram(); err != nil {
			d.log.DebugContext(ctx, "pages of the program are not given back", "error", err.Error())
		}
	}
	if tuned {
		debug.SetGCPercent(gcPercent)
	}
	<-ctx.Done()
	return ctx.Err()
}

// releaseProgram takes code and constants out of this process; what still runs comes back from the page cache as it is used.
func releaseProgram() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer maps.Close()
	regions, err := unchangedRegions(maps, exe)
	if err != nil {
		return err
	}
	for _, r := range regions {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, r.start, r.end-r.start, unix.MADV_DONTNEED); errno != 0 {
			return os.NewSyscallError("madvise", errno)
		}
	}
	return nil
}

// region is a part of the address space.
type region struct{ start, end uintptr }

// unchangedRegions are those of the file exe that can never differ from it: not writable, and no page of them written before
// they became so, as a linker's relocations are. Of others the content would be lost.
func unchangedRegions(smaps io.Reader, exe string) (regions []region, err error) {
	var current region
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		switch {
		case len(f) > 1 && strings.Contains(f[0], "-"): // 00400000-00e07000 r-xp 00000000 fe:00 10332537 /imdsgate
			current = region{}
			if len(f) != 6 || f[5] != exe || len(f[1]) != 4 || f[1][1] != '-' || f[1][3] != 'p' {
				continue
			}
			if _, err := fmt.Sscanf(f[0], "%x-%x", &current.start, &current.end); err != nil {
				return nil, fmt.Errorf("read /proc/self/smaps: %w", err)
			}
		case len(f) == 3 && f[0] == "Anonymous:" && f[1] == "0" && current.end > current.start:
			regions = append(regions, current)
		}
	}
	return regions, lines.Err()
}
