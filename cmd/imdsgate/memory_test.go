package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestUnchangedRegions(t *testing.T) {
	t.Parallel()
	const smaps = `00400000-00e07000 r-xp 00000000 fe:00 10332537                           /imdsgate
Rss:                9116 kB
Anonymous:             0 kB
THPeligible:           0
VmFlags: rd ex mr mw me
00e07000-01846000 r--p 00a07000 fe:00 10332537                           /imdsgate
Anonymous:             0 kB
01846000-01850000 r--p 01446000 fe:00 10332537                           /imdsgate
Rss:                  40 kB
Anonymous:             8 kB
01850000-018d1000 rw-p 01450000 fe:00 10332537                           /imdsgate
Anonymous:             0 kB
c000000000-c000400000 rw-p 00000000 00:00 0 
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 fe:00 77                         /usr/lib/libc.so.6
Anonymous:             0 kB
7f0000002000-7f0000003000 r--s 00000000 fe:00 10332537                   /imdsgate
Anonymous:             0 kB
7f0000004000-7f0000005000 r-xp 00000000 fe:00 10332537                   /imdsgate (deleted)
Anonymous:             0 kB
`
	got, err := unchangedRegions(strings.NewReader(smaps), "/imdsgate")
	want := []region{{0x400000, 0xe07000}, {0xe07000, 0x1846000}}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(region{})); d != "" || err != nil {
		t.Errorf("regions (-want +got): %v\n%s", err, d)
	}
	if r, err := unchangedRegions(strings.NewReader("zz-yy r-xp 0 fe:00 1 /imdsgate\nAnonymous: 0 kB\n"), "/imdsgate"); err == nil || len(r) != 0 {
		t.Errorf("nonsense gives %v, %v", r, err)
	}
}

// The program goes on when its pages were given back, also one with relocations and the race detector; and they are given back.
func TestReleaseProgram(t *testing.T) {
	mapped := func() (kib int) {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), "RssFile:")
		if _, err := fmt.Sscan(rest, &kib); err != nil {
			t.Fatal(err)
		}
		return kib
	}
	before := mapped()
	for range 3 {
		if err := releaseProgram(); err != nil {
			t.Fatal(err)
		}
	}
	if after := mapped(); after > before*3/4 {
		t.Errorf("%d KiB of files are mapped, %d before", after, before)
	}
}
