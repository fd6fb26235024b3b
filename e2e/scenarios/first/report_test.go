package first

import (
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/e2e/scenarios/heir"
)

const exposition = `# HELP x Something.
# TYPE x histogram
x_bucket{handler="a",le="0.001"} 2
x_bucket{handler="a",le="0.005"} 99
x_bucket{handler="a",le="0.01"} 100
x_bucket{handler="a",le="+Inf"} 100
x_sum{handler="a"} 1.5
x_count{handler="a"} 100
x_bucket{handler="b",le="0.001"} 0
x_bucket{handler="b",le="0.005"} 0
x_bucket{handler="b",le="0.01"} 0
x_bucket{handler="b",le="+Inf"} 1
x_sum{handler="b"} 3
x_count{handler="b"} 1
told_total{source="cni"} 7
told_total{source="api"} 1
`

func TestMetrics(t *testing.T) {
	m := Metrics{}
	for range 2 { // of two nodes
		if err := m.Read(strings.NewReader(exposition)); err != nil {
			t.Fatal(err)
		}
	}
	a := m.Histogram("x", `handler="a"`)
	want := Histogram{200, []Bucket{{0.001, 4}, {0.005, 198}, {0.01, 200}}}
	if diff := cmp.Diff(want, a); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for part, within := range map[float64]float64{0.99: 0.005, 0.991: 0.01, 0.01: 0.001} {
		if got := a.Within(part); got != within {
			t.Errorf("%v within %v, want %v", part, got, within)
		}
	}
	for bound, over := range map[time.Duration]float64{5 * time.Millisecond: 2, 6 * time.Millisecond: 2, time.Microsecond: 200, time.Second: 0} {
		if got := a.Over(bound); got != over {
			t.Errorf("%v over %s, want %v", got, bound, over)
		}
	}
	if all := m.Histogram("x"); all.Count != 202 || !math.IsInf(all.Within(1), 1) {
		t.Errorf("%+v", all)
	}
	if none := m.Since(m).Histogram("x"); none.Count != 0 || none.Within(0.99) != 0 {
		t.Errorf("%+v", none)
	}
	if n := m.Sum("told_total", `source="cni"`); n != 14 {
		t.Errorf("told %v times", n)
	}
	if err := m.Read(strings.NewReader("x y\n")); err == nil {
		t.Error("no error")
	}
}

// The report holds what was given to it at different times, and a figure that is there appears in all three files.
func TestWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out")
	add := func(change func(*Report)) {
		t.Helper()
		if err := Write(dir, change); err != nil {
			t.Fatal(err)
		}
	}
	add(func(*Report) {})
	add(func(r *Report) {
		r.SetBursts(Daemon{Source: CNI}, []Burst{{Source: CNI, AtOnce: 80, Pods: 1}})
		r.SetBursts(Daemon{Source: CNI}, []Burst{{Source: CNI, AtOnce: 80, Pods: 320, Served: 319, Milliseconds: []float64{1, 2, 5000}, Failures: map[string]int{"status 503": 1}}})
	})
	add(func(r *Report) {
		r.SetReuse(Reuse{Source: Informer, Wrong: 17, Tried: map[string]map[string]int{"a": {"b": 3}}})
	})
	add(func(r *Report) { r.Boto3 = &Burst{Pods: 30, Served: 29} })
	for file, wants := range map[string][]string{
		"first-request.json": {`"pods": 320`, `"wrong": 17`, `"served": 29`},
		"first-request.md":   {"**99.7 %** (319 of 320, 0 wrong)", "32–63 %", "1 × status 503", "another pod's role: 17", "3 × b", "29 served"},
		"first-request.svg":  {"80 pods at once", "kube2iam", "<path"},
	} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s lacks %q:\n%.3000s", file, want, b)
			}
		}
	}
}

// Answers are counted by whose they are, and what must not be is said.
func TestReuse(t *testing.T) {
	const ok = `{"Kind":"ok","AccessKeyID":"own"}`
	results := func(first, token, inherited string) string {
		return `{"Pod":"a","IP":"10.0.0.17","First":` + ok + `,"Tried":{}}
			{"Pod":"b","IP":"10.0.0.17","First":` + first + `,"After":"a","Gap":7000000,"Tried":{"` + heir.OldToken + `":` + token + `,"` + heir.OldConnection + `":` + inherited + `}}`
	}
	refused := `{"Kind":"status","Step":"list","Code":401}`
	for name, tt := range map[string]struct {
		results, err string
		wrong        int
	}{
		"as it should be":              {results: results(ok, refused, ok)},
		"wrong at first":               {results: results(`{"Kind":"ok","AccessKeyID":"other"}`, refused, ok), err: "1 answers with another pod's role", wrong: 1},
		"wrong with a token":           {results: results(ok, `{"Kind":"ok","AccessKeyID":"other"}`, ok), err: "1 answers with another pod's role", wrong: 1},
		"refused at first":             {results: results(`{"Kind":"status","Step":"list","Code":503}`, refused, ok), err: "1 of 2 first instructions served; the others: map[status 503 at the list:1]"},
		"refused on the connection":    {results: results(ok, refused, `{"Kind":"status","Step":"list","Code":503}`), err: "status 503"},
		"the connection is never here": {results: results(ok, refused, `{"Kind":"cut","Step":"list"}`), err: "only 0 of 1 inherited"},
		"the token counts":             {results: results(ok, ok, ok), err: "only 0 of 1 tokens"},
		"another address":              {results: `{"IP":"10.0.0.1"}`, err: "is not one of"},
	} {
		u := Reuse{}
		err := u.Count(strings.NewReader(tt.results), netip.MustParsePrefix("10.0.0.16/28"), func(_, key string) (bool, error) { return key == "own", nil })
		if err == nil {
			err = u.Check()
		}
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) || u.Wrong != tt.wrong {
			t.Errorf("%s: %v, %+v; want %q", name, err, u, tt.err)
		}
	}
}
