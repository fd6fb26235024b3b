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

// keepSmall is a task that keeps resident memory to what serving needs. The start touches most of the program, reads all pods
// of the node and opens a watch for each service account. When that is over, and once more when the first credentials have
// come, what it needed is given back. The environment variable GOGC overrules the collector's settings.
func (d *daemon) keepSmall(ctx context.Context) error {
	tuned := os.Getenv("GOGC") == ""
	if tuned {
		debug.SetGCPercent(gcPercentStart)
	}
	if err := d.pods.WaitSynced(ctx); err != nil {
		return ctx.Err()
	}
	started, settled := time.After(2*time.Second), time.After(30*time.Second) // the first credentials have come
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var c collector
	for {
		select {
		case <-look.C:
			if tuned {
				c.follow()
			}
			continue
		case <-started:
		case <-settled:
		case <-ctx.Done():
			return ctx.Err()
		}
		debug.FreeOSMemory()
		if err := releaseProgram(); err != nil {
			d.log.DebugContext(ctx, "pages of the program stay mapped", "error", err.Error())
		}
	}
}

// releaseProgram unmaps the program's code and constants: what still runs is mapped again as it is used, in a tenth of a
// millisecond. The start runs through most of the program's 20 MB, which then count as this process's although nothing needs
// them. The file stays in the page cache, where the kernel would take it from under pressure without us: what is saved is 8 MB of
// the resident size that people size nodes by, no memory that was not to be had.
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
