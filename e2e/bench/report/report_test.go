package report

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestVerdict(t *testing.T) {
	for _, tt := range []struct {
		bar  Bar
		want Verdict
	}{
		{Bar{Value: 1.1, Max: 1.1}, Met},
		{Bar{Value: 1.11, Max: 1.1}, NotMet},
		{Bar{Value: 1.11, Max: 1.1, Noise: &Range{0.9, 1.1}}, NotMet},
		{Bar{Value: 1.11, Max: 1.1, Noise: &Range{0.9, 1.11}}, Noise},
	} {
		if got := tt.bar.Verdict(); got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.bar, got, tt.want)
		}
	}
}

// Sections of different processes end in one report; one that is measured again takes the place it had.
func TestAdd(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out")
	curve := Plot{
		Name: "curve", Title: "Latency", X: Axis{Label: "percentile", Percentiles: true}, Y: Axis{Label: "ms", Log: true},
		Lines: []Line{{Name: "imdsgate", Points: []Point{{0, 0.1}, {50, 0.2}, {99.9, 1}}}},
	}
	for _, s := range []Section{
		{ID: "one", Title: "One", Bars: []Bar{{What: "cpu", Value: 2, Max: 1.1, Unit: "×"}}},
		{ID: "two", Title: "Two", Text: "How.", Tables: []Table{{Head: []string{"a", "b"}, Rows: [][]string{{"x|y", "2"}}}}, Plots: []Plot{curve}},
		{ID: "one", Title: "One", Bars: []Bar{{What: "cpu", Value: 1.05, Max: 1.1, Unit: "×", Noise: &Range{0.98, 1.02}}}},
	} {
		if err := Add(dir, s); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, s := range r.Sections {
		ids = append(ids, s.ID)
		if s.Taken.IsZero() || s.On.Cores == 0 || s.On.CPU == "" {
			t.Errorf("section %s does not say when and where: %+v", s.ID, s)
		}
	}
	if diff := cmp.Diff([]string{"one", "two"}, ids); diff != "" {
		t.Error(diff)
	}
	md, err := os.ReadFile(filepath.Join(dir, "bench.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| cpu | 1.05× | ≤ 1.10× | 0.98× – 1.02× | met |", `| x\|y | 2 |`, "![Latency](curve.svg)", "## Two\n\nHow.",
	} {
		if !strings.Contains(string(md), want) {
			t.Errorf("bench.md lacks %q:\n%s", want, md)
		}
	}
	svg, err := os.ReadFile(filepath.Join(dir, "curve.svg"))
	if err != nil || !strings.Contains(string(svg), "<svg") {
		t.Errorf("curve.svg: %v, %.100s", err, svg)
	}
}
