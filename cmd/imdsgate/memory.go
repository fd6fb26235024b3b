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
// come, what it needed is given back: a full node's daemon has 29 MB then, not 54. The environment variable GOGC overrules.
func (d *daemon) keepSmall(ctx context.Context) error {
	tuned := os.Getenv("GOGC") == ""
	if tuned {
		debug.SetGCPercent(gcPercentStart)
	}
	if err := d.pods.WaitSynced(ctx); err != nil {
		return ctx.Err()
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var c collector
	for second := 1; ; second++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if second == 2 || second == 30 {
			debug.FreeOSMemory()
		}
		if second == 2 || second%10 == 0 {
			if err := releaseProgram(programAtRest); err != nil {
				d.log.DebugContext(ctx, "pages of the program are not given back", "error", err.Error())
			}
		}
		if tuned {
			c.follow()
		}
	}
}

// programAtRest is how many bytes of the program's 20 MB may be mapped before they are given back. Serving needs half of that;
// each of its pages brings 15 neighbours.
const programAtRest = 10 << 20

// releaseProgram takes code and constants out of this process if more than so many bytes of files are mapped; what still runs
// comes back from the page cache as it is used, in a tenth of a millisecond.
func releaseProgram(atRest int64) error {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return err
	}
	var size, resident, mapped int64 // pages; the last is of files
	if _, err := fmt.Sscan(string(statm), &size, &resident, &mapped); err != nil {
		return fmt.Errorf("read /proc/self/statm: %w", err)
	}
	if mapped*int64(os.Getpagesize()) <= atRest {
		return nil
	}
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
