package growth

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const scrape = `# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
process_cpu_seconds_total 12.5
apiserver_longrunning_requests{component="apiserver",group="",resource="pods",scope="cluster",subresource="",verb="WATCH",version="v1"} 3
apiserver_longrunning_requests{component="apiserver",group="",resource="configmaps",scope="cluster",subresource="",verb="WATCH",version="v1"} 2
apiserver_longrunning_requests{component="apiserver",group="",resource="pods",scope="resource",subresource="exec",verb="CONNECT",version="v1"} 7
apiserver_request_total{code="0",component="apiserver",dry_run="",group="",resource="pods",scope="cluster",subresource="",verb="WATCH",version="v1"} 4
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="status",verb="PATCH",version="v1"} 30
apiserver_request_total{code="409",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="status",verb="PATCH",version="v1"} 1
apiserver_request_total{code="200",component="",dry_run="",group="",resource="",scope="",subresource="/metrics",verb="GET",version=""} 5
`

func TestParse(t *testing.T) {
	got, err := parse([]byte(scrape))
	if err != nil {
		t.Fatal(err)
	}
	want := apiServer{
		Watches: 3, All: 5, CPU: 12.5,
		Requests: map[string]float64{"WATCH pods": 7, "WATCH configmaps": 2, "PATCH pods/status": 31, "GET /metrics": 5},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := got.requests(); got != 45 {
		t.Errorf("%v requests, want 45", got)
	}
}

func TestEstimate(t *testing.T) {
	for name, tt := range map[string]struct {
		measured float64
		idle     []float64
		share    float64
		clients  float64
		digits   int
		want     string
	}{
		"well above":                   {6, []float64{0.9, 1, 1.1}, 1, 50, 3, "0.100 ± 0.004"},
		"a part of a minute":           {6, []float64{1, 1}, 0.5, 1, 1, "5.5"},
		"as the idle minutes differ":   {1.2, []float64{0.9, 1, 1.1}, 1, 20, 3, "below the noise (± 0.010)"},
		"less than nothing":            {0.5, []float64{0.9, 1, 1.1}, 1, 1, 3, "below the noise (± 0.500)"},
		"too little noise to be shown": {120, []float64{0, 0.01}, 1, 20, 1, "6.0"},
		"nothing, and no noise":        {18, []float64{18, 18}, 1, 50, 1, "0.0"},
		"a little less than nothing":   {17.9, []float64{18, 18}, 1, 50, 1, "0.0"},
	} {
		if got := above(tt.measured, tt.idle, tt.share).times(1 / tt.clients).text(tt.digits); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// The table has each figure for one client and multiplied, and none that the noise may have made.
func TestDaemonsSection(t *testing.T) {
	did := func(minutes, cpu, watches, puts float64) apiServer { // of them a minute takes 1 s, 12 requests and 6 by itself
		return apiServer{
			CPU: minutes + cpu, All: watches,
			Requests: map[string]float64{"GET openapi/v3": 12 * minutes, "WATCH pods": watches, "PUT leases": 6*minutes + puts},
		}
	}
	daemons := cost{clients: 50, ready: 6 * time.Second, start: did(0.1, 5, 1850, 0), quiet: did(1, 0.1, 0, 0), startBytes: 50e5, quietBytes: 50e3}
	kubelets := cost{clients: 20, ready: 30 * time.Second, start: did(0.5, 8, 100, 20), quiet: did(1, 2, 0, 120), startBytes: 20e6, quietBytes: 20e3}
	s := daemonsSection(daemons, kubelets, []apiServer{did(1, -0.1, 0, 0), did(1, 0.1, 0, 0), did(1, 0, 0, 0)})
	want := [][]string{
		{"watches", "37", "5", "185000", "25000"},
		{"start: requests", "37", "6", "185000", "30000"},
		{"start: CPU of the API server, s", "0.100 ± 0.004", "0.400 ± 0.010", "500 ± 20", "2000 ± 50"},
		{"start: kB from the API server", "100", "1000", "500000", "5000000"},
		{"a quiet minute: requests", "0.0", "6.0", "0", "30000"},
		{"a quiet minute: CPU of the API server, s", "below the noise (± 0.004)", "0.100 ± 0.010", "below the noise (± 20)", "500 ± 50"},
		{"a quiet minute: kB from the API server", "1.0", "1.0", "5000", "5000"},
		{"later, a minute: watches asked for again, computed", "4.9", "0.7", "24667", "3333"},
	}
	if diff := cmp.Diff(want, s.Tables[0].Rows); diff != "" {
		t.Error(diff)
	}
	for _, what := range []string{"quiet minute: a daemon nothing; a kubelet PUT leases 6.0.", "a daemon WATCH pods 37.0", "a kubelet WATCH pods 5.0, PUT leases 1.0."} {
		if !strings.Contains(s.Text, what) {
			t.Errorf("no %q in %s", what, s.Text)
		}
	}
}

// What differs as much from one idle minute to the next was not asked by the clients.
func TestKinds(t *testing.T) {
	did := func(gets, puts, patches float64) apiServer {
		return apiServer{Requests: map[string]float64{"GET openapi/v3": gets, "PUT leases": puts, "PATCH nodes/status": patches}}
	}
	idle := []apiServer{did(12, 6, 0), did(32, 6, 0)}
	for want, did := range map[string]apiServer{
		"PUT leases 6.0, PATCH nodes/status 0.2": did(40, 66, 2),
		"nothing":                                did(22, 6.5, 0),
	} {
		if got := kinds(did, 10, idle, 1); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
