package main

import (
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRatios(t *testing.T) {
	a := series{{CPU: 3}, {CPU: 10}, {CPU: 4}, {CPU: 2}, {CPU: 2}, {CPU: 9}}
	b := series{{CPU: 2}, {CPU: 10}, {CPU: 1}, {CPU: 4}, {CPU: 2}, {CPU: 1}}
	for _, tc := range []struct {
		turns int
		figure
		want []float64
	}{
		{1, cpu, []float64{0.5, 1, 1, 1.5, 4, 9}},
		{3, cpu, []float64{17. / 13, 13. / 7}},
		{3, figure{cpu.of, false}, []float64{1, 1.5}},
	} {
		if diff := cmp.Diff(tc.want, ratios(a, b, tc.turns, tc.figure)); diff != "" {
			t.Errorf("ratios of rounds of %d turns, sums %v (-want +got):\n%s", tc.turns, tc.sum, diff)
		}
	}
	if got := a[:3].median(cpu); got != 4 {
		t.Errorf("median %d, want 4", got)
	}
	if got := median([]float64{1, 2, 4, 8}); got != 3 {
		t.Errorf("median of four: %v, want 3", got)
	}
}

func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 50*time.Millisecond; {
	}
	after, err := cpuTime(os.Getpid())
	if err != nil || after-before <= 0 || after-before > 10*time.Second {
		t.Errorf("50 ms of work took %v of CPU time: %v", after-before, err)
	}
	if _, err := cpuTime(1 << 30); err == nil {
		t.Error("a process that is not there has CPU time")
	}
}
