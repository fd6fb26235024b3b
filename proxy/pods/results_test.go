package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/proxy"
)

// sandbox is one result file as a runtime writes it.
type sandbox struct {
	pod, id, uid    string // uid: of the pod by default
	ns              string
	network, ifName string
	ips             []string
	at              time.Time // of the file; zero: when it is written
	result          string    // instead of ips
}

func (s sandbox) file() string {
	return fmt.Sprintf("%s-%s-%s", or(s.network, "bridge"), or(s.id, "box-"+s.pod), or(s.ifName, "eth0"))
}

func or(s, standard string) string {
	if s == "" {
		return standard
	}
	return s
}

func (s sandbox) json() []byte {
	result := json.RawMessage(s.result)
	if s.result == "" {
		var ips []map[string]any
		for _, ip := range s.ips {
			ips = append(ips, map[string]any{"interface": 1, "address": ip + map[bool]string{true: "/64", false: "/24"}[strings.Contains(ip, ":")]})
		}
		var err error
		if result, err = json.Marshal(map[string]any{
			"cniVersion": "1.0.0", "ips": ips, "interfaces": []map[string]string{{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/x"}},
		}); err != nil {
			panic(err)
		}
	}
	data, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": or(s.id, "box-"+s.pod), "ifName": or(s.ifName, "eth0"), "networkName": or(s.network, "bridge"),
		"config": []byte(`{}`), "netns": "/run/netns/x", "result": result,
		"cniArgs": [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", or(s.ns, "shop")},
			{"K8S_POD_NAME", s.pod},
			{"K8S_POD_INFRA_CONTAINER_ID", or(s.id, "box-"+s.pod)},
			{"K8S_POD_UID", or(s.uid, "uid-"+s.pod)},
		},
	})
	if err != nil {
		panic(err)
	}
	return data
}

// cniNode is a harness with a directory of results.
type cniNode struct {
	*harness
	t   *testing.T
	dir string
	n   int
}

// newCNINode has not started. The directory belongs to whoever runs the test, who stands for root.
func newCNINode(t *testing.T, a *apiServer) *cniNode {
	n := &cniNode{t: t, harness: newHarness(t, a, testPolicy()), dir: filepath.Join(t.TempDir(), "cni", "results")}
	n.results = newResults(n.Pods, n.dir)
	n.results.owner = uint32(os.Getuid())
	booted := time.Now().Add(-time.Hour)
	n.results.boot = func() (time.Time, error) { return booted, nil }
	return n
}

func (n *cniNode) mkdir() *cniNode {
	n.must(os.MkdirAll(n.dir, 0o700))
	return n
}

func (n *cniNode) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// write writes as libcni does, or, with a time, puts a file there that has it from the start.
func (n *cniNode) write(boxes ...sandbox) {
	n.t.Helper()
	for _, s := range boxes {
		path := filepath.Join(n.dir, s.file())
		if s.at.IsZero() {
			n.must(os.WriteFile(path, s.json(), 0o600))
			continue
		}
		n.n++
		aside := filepath.Join(filepath.Dir(n.dir), fmt.Sprint("aside", n.n))
		n.must(os.WriteFile(aside, s.json(), 0o600))
		n.must(os.Chtimes(aside, s.at, s.at))
		n.must(os.Rename(aside, path))
	}
}

func (n *cniNode) remove(s sandbox) { n.t.Helper(); n.must(os.Remove(filepath.Join(n.dir, s.file()))) }

// settle returns when everything so far was applied: the API's events, then the files'.
func (n *cniNode) settle() {
	n.t.Helper()
	n.flush()
	n.n++
	ip := netip.AddrFrom4([4]byte{10, 255, byte(n.n >> 8), byte(n.n)}).String()
	n.write(sandbox{pod: "sentinel", ns: "sentinel", id: fmt.Sprint("sentinel", n.n), ips: []string{ip}})
	poll(n.t, "the sentinel's file", func() bool { return find(n.Pods, ip) == "sentinel refused(0)" })
}

func (n *cniNode) source(s string) float64 {
	n.t.Helper()
	families, err := n.metrics.Gather()
	n.must(err)
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "imdsgate_identify_source_total" && m.Label[0].GetValue() == s {
				return m.Counter.GetValue()
			}
		}
	}
	n.t.Fatal("no such metric: ", s)
	return 0
}

// The rule, case by case: what the files say, what the API server says, who is served.
func TestClaims(t *testing.T) {
	const ip = "10.0.0.1"
	old, now := time.Now().Add(-10*time.Minute), time.Now().Add(-time.Second)
	one := []string{ip}
	put := func(n *cniNode, name string, ips []string, edits ...func(*corev1.Pod)) {
		n.put(podOf(name, "cart", ips, edits...))
	}
	a, b := sandbox{pod: "a", ips: one, at: old}, sandbox{pod: "b", ips: one, at: now}
	type step struct {
		name string
		do   func(n *cniNode)
		want map[string]string
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"before the API server knows the IP", []step{
			{"bound", func(n *cniNode) { put(n, "a", nil) }, map[string]string{ip: "unknown"}},
			{"sandbox", func(n *cniNode) { n.write(a) }, map[string]string{ip: "a as cart"}},
			{"status", func(n *cniNode) { put(n, "a", one) }, map[string]string{ip: "a as cart"}},
		}},
		{"no result at all: the API server's rule", []step{
			{"status", func(n *cniNode) { put(n, "a", one) }, map[string]string{ip: "a as cart"}},
			{"another", func(n *cniNode) { put(n, "b", one) }, map[string]string{ip: "ambiguous"}},
		}},
		{"a file for a pod that is not known, which then comes", []step{
			{"sandbox", func(n *cniNode) { n.write(a) }, map[string]string{ip: "unknown"}},
			{"another pod by the API server", func(n *cniNode) { put(n, "b", one) }, map[string]string{ip: "unknown"}},
			{"the other is gone", func(n *cniNode) { n.delete(podOf("b", "cart", one)) }, map[string]string{ip: "unknown"}},
			{"it comes", func(n *cniNode) { put(n, "a", nil) }, map[string]string{ip: "a as cart"}},
		}},
		{"re-used while the API server still shows the old pod", []step{
			{"old", func(n *cniNode) { put(n, "a", one); put(n, "b", nil); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"old one removed", func(n *cniNode) { n.remove(a) }, map[string]string{ip: "unknown"}},
			{"new one", func(n *cniNode) { n.write(b) }, map[string]string{ip: "b as cart"}},
			{"status of the new", func(n *cniNode) { put(n, "b", one) }, map[string]string{ip: "b as cart"}},
			{"old one ends", func(n *cniNode) { put(n, "a", one, phase(corev1.PodSucceeded)) }, map[string]string{ip: "b as cart"}},
		}},
		{"re-used before the old file is removed: libcni frees the IP first", []step{
			{"old", func(n *cniNode) { put(n, "a", one); put(n, "b", nil); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"new one", func(n *cniNode) { n.write(b) }, map[string]string{ip: "b as cart"}},
			{"old one removed", func(n *cniNode) { n.remove(a) }, map[string]string{ip: "b as cart"}},
			{"new one removed too", func(n *cniNode) { n.remove(b) }, map[string]string{ip: "unknown"}},
			{"a third by the API server alone", func(n *cniNode) { put(n, "c", one) }, map[string]string{ip: "c as cart"}},
			{"the first is gone there too", func(n *cniNode) { n.delete(podOf("a", "cart", one)) }, map[string]string{ip: "c as cart"}},
		}},
		{"the directory goes: the API server's word alone, at once", []step{
			{"removed", func(n *cniNode) { put(n, "a", one); n.write(a); n.settle(); n.remove(a) }, map[string]string{ip: "unknown"}},
			{"all", func(n *cniNode) {
				n.must(os.RemoveAll(n.dir))
				poll(n.t, "the API server's word", func() bool { return find(n.Pods, ip) == "a as cart" })
				n.mkdir()
			}, map[string]string{ip: "a as cart"}},
		}},
		{"lost long ago: the API server has heard of it", []step{
			{"removed", func(n *cniNode) {
				put(n, "a", one)
				n.write(a)
				n.settle()
				n.remove(a)
			}, map[string]string{ip: "unknown"}},
			{"after the delay", func(n *cniNode) {
				n.Pods.mu.Lock()
				end := n.claims.losses[0].end
				n.Pods.mu.Unlock()
				n.results.settle(end.Add(-1))
				if got := find(n.Pods, ip); got != "unknown" || end.Sub(now) < reportDelay {
					n.t.Errorf("before the delay's end, at %s: %s", end, got)
				}
				n.results.settle(end)
			}, map[string]string{ip: "a as cart"}},
		}},
		{"re-used, the API server tells of the new one first", []step{
			{"old", func(n *cniNode) { put(n, "a", one); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"status of the new", func(n *cniNode) { put(n, "b", one) }, map[string]string{ip: "ambiguous"}},
			{"its file", func(n *cniNode) { n.write(b) }, map[string]string{ip: "b as cart"}},
		}},
		{"the old pod is terminating", []step{
			{"both", func(n *cniNode) { put(n, "a", one, terminating); put(n, "b", nil); n.write(b) }, map[string]string{ip: "b as cart"}},
		}},
		{"a terminating pod keeps its IP", []step{
			{"terminating", func(n *cniNode) { put(n, "a", one, terminating); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"ended", func(n *cniNode) { put(n, "a", one, terminating, ended) }, map[string]string{ip: "unknown"}},
		}},
		{"the API server's pod never had a result: undecidable", []step{
			{"both", func(n *cniNode) { put(n, "a", one); put(n, "b", nil); n.write(b) }, map[string]string{ip: "ambiguous"}},
			{"the other is gone", func(n *cniNode) { n.delete(podOf("a", "cart", one)) }, map[string]string{ip: "b as cart"}},
		}},
		{"two results of the same time", []step{
			{"both", func(n *cniNode) {
				put(n, "a", nil)
				put(n, "b", nil)
				n.write(a, sandbox{pod: "b", ips: one, at: old})
			}, map[string]string{ip: "ambiguous"}},
			{"one removed", func(n *cniNode) { n.remove(a) }, map[string]string{ip: "b as cart"}},
		}},
		{"the clock was set back in between", []step{
			{"both", func(n *cniNode) { put(n, "a", nil); put(n, "b", nil); n.write(b) }, map[string]string{ip: "b as cart"}},
			{"an older one comes", func(n *cniNode) { n.write(a) }, map[string]string{ip: "ambiguous"}},
			{"the first is removed", func(n *cniNode) { n.remove(b) }, map[string]string{ip: "a as cart"}},
		}},
		{"of the last boot", []step{
			{"both", func(n *cniNode) {
				put(n, "a", nil)
				put(n, "b", one)
				n.write(sandbox{pod: "a", ips: one, at: time.Now().Add(-2 * time.Hour)})
			}, map[string]string{ip: "b as cart"}},
		}},
		{"removed", []step{
			{"sandbox", func(n *cniNode) { put(n, "a", nil); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"removed", func(n *cniNode) { n.remove(a) }, map[string]string{ip: "unknown"}},
		}},
		{"the pod is gone, its file is not", []step{
			{"both", func(n *cniNode) { put(n, "a", nil); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"gone", func(n *cniNode) { n.delete(podOf("a", "cart", nil)) }, map[string]string{ip: "unknown"}},
		}},
		{"a file left behind, its pod unknown", []step{
			{"the API server's pod is older", func(n *cniNode) { n.write(a); put(n, "b", one, taken(old.Add(-time.Minute))) }, map[string]string{ip: "unknown"}},
			{"of the same second", func(n *cniNode) { put(n, "b", one, taken(old)) }, map[string]string{ip: "unknown"}},
			{"later, but by a clock that is not ours", func(n *cniNode) { put(n, "b", one, taken(now.Add(time.Hour))) }, map[string]string{ip: "unknown"}},
			{"later", func(n *cniNode) { n.delete(podOf("b", "cart", one)); put(n, "b", one, taken(now)) }, map[string]string{ip: "b as cart"}},
			{"another one, too", func(n *cniNode) { put(n, "c", one, taken(now)) }, map[string]string{ip: "unknown"}},
			{"which terminates", func(n *cniNode) { put(n, "c", one, taken(now), terminating) }, map[string]string{ip: "b as cart"}},
			{"as this one does", func(n *cniNode) { put(n, "b", one, taken(now), terminating) }, map[string]string{ip: "unknown"}},
		}},
		{"a file left behind, its pod ended", []step{
			{"later", func(n *cniNode) {
				put(n, "a", one, phase(corev1.PodSucceeded))
				n.write(a)
				put(n, "b", one, taken(now))
			}, map[string]string{ip: "b as cart"}},
			{"which has another address by its own result", func(n *cniNode) { n.write(sandbox{pod: "b", ips: []string{"10.0.0.2"}}) },
				map[string]string{ip: "unknown", "10.0.0.2": "b as cart"}},
		}},
		{"a file left behind, its pod still runs: undecidable", []step{
			{"both", func(n *cniNode) { put(n, "a", one); n.write(a); put(n, "b", one, taken(now)) }, map[string]string{ip: "ambiguous"}},
		}},
		{"written anew while its pod is not known yet", []step{
			{"old", func(n *cniNode) { put(n, "b", one, taken(old)) }, map[string]string{ip: "b as cart"}},
			{"new", func(n *cniNode) { n.write(sandbox{pod: "a", ips: one}) }, map[string]string{ip: "unknown"}},
		}},
		{"dual stack, and an address that is in no status", []step{
			{"all", func(n *cniNode) {
				put(n, "a", []string{"fd00::1"})
				n.write(sandbox{pod: "a", ips: []string{"fd00::1", "169.254.172.2"}}, sandbox{pod: "a", network: "storage", ifName: "net1", ips: []string{"10.9.0.1"}})
			}, map[string]string{"fd00::1": "a as cart", "169.254.172.2": "a as cart", "10.9.0.1": "a as cart", "::ffff:10.9.0.1": "a as cart"}},
			{"one network removed", func(n *cniNode) { n.remove(sandbox{pod: "a", network: "storage", ifName: "net1"}) },
				map[string]string{"fd00::1": "a as cart", "10.9.0.1": "unknown"}},
			{"the pod's decision changes", func(n *cniNode) {
				n.put(account("cart", proxy.AnnotationRoleARN, "no role"))
				poll(n.t, "the refusal", func() bool { return find(n.Pods, "fd00::1") == "a refused(2)" })
			}, map[string]string{"fd00::1": "a refused(2)", "169.254.172.2": "a refused(2)"}},
		}},
		{"two sandboxes of one pod", []step{
			{"both", func(n *cniNode) {
				put(n, "a", one)
				n.write(sandbox{pod: "a", id: "first", ips: one}, sandbox{pod: "a", id: "second", ips: []string{"10.0.0.2"}})
			}, map[string]string{ip: "a as cart", "10.0.0.2": "a as cart"}},
			{"the first is removed and its IP re-used", func(n *cniNode) {
				n.remove(sandbox{pod: "a", id: "first"})
				put(n, "b", nil)
				n.write(sandbox{pod: "b", ips: one})
			}, map[string]string{ip: "b as cart", "10.0.0.2": "a as cart"}},
		}},
		{"two networks give one address: undecidable, whichever came later", []step{
			{"the first", func(n *cniNode) { put(n, "a", one); n.write(a) }, map[string]string{ip: "a as cart"}},
			{"the other network", func(n *cniNode) {
				put(n, "b", []string{"10.0.0.2"})
				n.write(sandbox{pod: "b", ips: []string{"10.0.0.2"}}, sandbox{pod: "b", network: "storage", ifName: "net1", ips: one})
			}, map[string]string{ip: "ambiguous", "10.0.0.2": "b as cart"}},
			{"removed", func(n *cniNode) { n.remove(sandbox{pod: "b", network: "storage", ifName: "net1"}) },
				map[string]string{ip: "a as cart", "10.0.0.2": "b as cart"}},
			{"on another interface of one network", func(n *cniNode) { n.write(sandbox{pod: "b", ifName: "net1", ips: one}) },
				map[string]string{ip: "ambiguous", "10.0.0.2": "b as cart"}},
			{"the first ends", func(n *cniNode) { put(n, "a", one, phase(corev1.PodSucceeded)) },
				map[string]string{ip: "b as cart", "10.0.0.2": "b as cart"}},
		}},
		{"a static pod, by its mirror", []step{
			{"both", func(n *cniNode) {
				put(n, "static", nil, annotated(corev1.MirrorPodAnnotationKey, "hash"))
				n.write(sandbox{pod: "static", uid: "hash", ips: one})
			}, map[string]string{ip: "static refused(0)"}},
			{"a mirror that claims another pod's UID", func(n *cniNode) {
				put(n, "a", nil)
				put(n, "liar", nil, annotated(corev1.MirrorPodAnnotationKey, "uid-a"))
				n.write(sandbox{pod: "a", ips: []string{"10.0.0.2"}})
			}, map[string]string{ip: "static refused(0)", "10.0.0.2": "a as cart"}},
			{"a second mirror of the same", func(n *cniNode) {
				put(n, "twin", nil, annotated(corev1.MirrorPodAnnotationKey, "hash"))
				n.write(sandbox{pod: "static", uid: "hash", ips: one})
			}, map[string]string{ip: "unknown"}},
		}},
		{"a name that is not its UID's", []step{
			{"sandbox", func(n *cniNode) { put(n, "a", one); n.write(sandbox{pod: "b", uid: "uid-a", ips: one}) }, map[string]string{ip: "unknown"}},
		}},
		{"in the node's network", []step{
			{"sandbox", func(n *cniNode) { put(n, "a", one, hostNetwork); n.write(a) }, map[string]string{ip: "unknown"}},
		}},
		{"cut off, empty, garbage, a copy: not a word of it", []step{
			{"files", func(n *cniNode) {
				put(n, "a", nil)
				put(n, "b", one)
				path := filepath.Join(n.dir, a.file())
				n.must(os.WriteFile(path+"1", a.json(), 0o600)) // a backup
				n.must(os.WriteFile(path+"2", []byte("\x00garbage"), 0o600))
				n.must(os.WriteFile(path+"3", nil, 0o600))
				n.must(os.WriteFile(path, a.json()[:60], 0o600))
			}, map[string]string{ip: "b as cart"}},
			{"complete", func(n *cniNode) { n.delete(podOf("b", "cart", one)); n.write(sandbox{pod: "a", ips: one}) }, map[string]string{ip: "a as cart"}},
			{"emptied", func(n *cniNode) { n.must(os.Truncate(filepath.Join(n.dir, a.file()), 0)) }, map[string]string{ip: "unknown"}},
		}},
		{"hard link: under another name it says nothing, and it is no second result", []step{
			{"files", func(n *cniNode) {
				put(n, "a", nil)
				put(n, "b", one)
				n.write(a)
				n.must(os.Link(filepath.Join(n.dir, a.file()), filepath.Join(n.dir, b.file())))
			}, map[string]string{ip: "ambiguous"}}, // of a and of the API server's b
			{"the first name is gone", func(n *cniNode) { n.remove(a) }, map[string]string{ip: "b as cart"}},
		}},
		{"symbolic link, FIFO, directory, writable by others, huge", []step{
			{"files", func(n *cniNode) {
				put(n, "a", nil)
				aside := filepath.Join(n.t.TempDir(), "aside")
				n.must(os.WriteFile(aside, a.json(), 0o600))
				n.must(os.Symlink(aside, filepath.Join(n.dir, a.file())))
				n.must(syscall.Mkfifo(filepath.Join(n.dir, "fifo"), 0o600))
				n.must(os.Mkdir(filepath.Join(n.dir, "directory"), 0o700))
				open := sandbox{pod: "a", id: "open", ips: []string{"10.0.0.2"}}
				n.write(open)
				n.must(os.Chmod(filepath.Join(n.dir, open.file()), 0o620))
				huge := sandbox{pod: "a", id: "huge", ips: []string{"10.0.0.3"}}
				n.must(os.WriteFile(filepath.Join(n.dir, huge.file()), append(huge.json(), strings.Repeat(" ", maxResultSize)...), 0o600))
			}, map[string]string{ip: "unknown", "10.0.0.2": "unknown", "10.0.0.3": "unknown"}},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			api := newAPIServer(t)
			shop(api)
			api.put(podOf("keeper", "cart", nil)) // so that the service account is known throughout
			n := newCNINode(t, api).mkdir()
			n.run(t)
			n.synced(t)
			for _, s := range tt.steps {
				s.do(n)
				n.settle()
				got := map[string]string{}
				for ip := range s.want {
					got[ip] = find(n.Pods, ip)
				}
				if diff := cmp.Diff(s.want, got); diff != "" {
					t.Fatalf("%s: (-want +got)\n%s\n%s", s.name, diff, n.log)
				}
			}
			// Whoever starts now sees the same files and the same pods, and must not find anybody else.
			again := newCNINode(t, api)
			again.dir, again.results.dir = n.dir, n.dir
			again.run(t)
			again.synced(t)
			for ip, want := range tt.steps[len(tt.steps)-1].want {
				if got := find(again.Pods, ip); got != want && got != "ambiguous" { // it has not seen what was removed
					t.Errorf("after a restart %s is %s, was %s", ip, got, want)
				}
			}
		})
	}
}

func taken(at time.Time) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Status.StartTime = &metav1.Time{Time: at} }
}

// While a file is swapped for others under its reader, each that is believed is whole: its content, its time and its kind are of
// one file.
func TestSwappedFiles(t *testing.T) {
	t.Parallel()
	n := newCNINode(t, newAPIServer(t)).mkdir()
	old, now := time.Now().Add(-10*time.Minute), time.Now()
	one := sandbox{pod: "a", id: "box", ips: []string{"10.0.0.1"}, at: old}
	two := sandbox{pod: "b", id: "box", ips: []string{"10.0.0.2"}, at: now, ns: strings.Repeat("n", 200)}
	path := filepath.Join(n.dir, one.file())
	n.write(one)
	aside := filepath.Join(t.TempDir(), "aside")
	n.must(os.WriteFile(aside, sandbox{pod: "c", id: "box", ips: []string{"10.0.0.3"}}.json(), 0o600))
	done := make(chan struct{})
	var both atomic.Bool // have been believed: whoever swaps may have the processor alone for as long as it takes to swap them all
	limit := time.Now().Add(20 * time.Second)
	go func() {
		defer close(done)
		for i := 0; i < 100 || !both.Load() && time.Now().Before(limit); i++ {
			n.write(two)
			runtime.Gosched()
			for _, odd := range []func(string) error{
				func(p string) error { return os.Symlink(aside, p) },
				func(p string) error { return syscall.Mkfifo(p, 0o600) },
				func(p string) error { return os.WriteFile(p, two.json()[:40], 0o600) },
				func(p string) error { return os.WriteFile(p, nil, 0o600) },
			} {
				if err := errors.Join(odd(aside+"2"), os.Rename(aside+"2", path)); err != nil {
					t.Error(err)
				}
			}
			n.write(one)
		}
	}()
	believed := map[string]int{}
	for end := false; !end; {
		select {
		case <-done:
			end = true
		default:
		}
		cl, err := n.results.open(one.file())
		if err != nil {
			continue
		}
		believed[cl.name]++
		both.Store(believed["a"] > 0 && believed["b"] > 0)
		want := map[string]sandbox{"a": one, "b": two}[cl.name]
		if !cl.at.Equal(want.at) || len(cl.ips) != 1 || cl.ips[0].String() != want.ips[0] || cl.namespace != or(want.ns, "shop") {
			t.Fatalf("believed %+v", cl)
		}
	}
	if believed["a"] == 0 || believed["b"] == 0 {
		t.Errorf("believed %v: nothing was swapped under the reader", believed)
	}
}

// What runtimes write, byte for byte. cri-o.json is libcni's, with the arguments that CRI-O passes.
func TestRuntimesFiles(t *testing.T) {
	for name, want := range map[string]result{
		"cri-o.json": {
			namespace: "shop", name: "a", uid: "5d2f7c0e-8f5a-4c61-9b7e-1a2b3c4d5e6f", network: "crio", ifName: "eth0",
			ips: []netip.Addr{addr("10.88.0.7"), addr("fd00:88::7")},
		},
	} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		var of struct{ ContainerID string }
		if err := json.Unmarshal(data, &of); err != nil {
			t.Fatal(err)
		}
		got, err := parseResult(want.network+"-"+of.ContainerID+"-"+want.ifName, data)
		if err != nil || !got.equal(&want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

// The first request of a pod's life is held until its file is there, and no longer; the counter says who knew.
func TestResultWakes(t *testing.T) {
	api := newAPIServer(t)
	shop(api)
	api.put(podOf("a", "cart", nil), podOf("b", "cart", []string{"10.0.0.2"}))
	n := newCNINode(t, api) // without a directory
	n.run(t)
	n.synced(t)
	poll(t, "the log", func() bool { return strings.Contains(n.log.String(), "no CNI results yet") })
	woken := make(chan *proxy.Caller, 1)
	go func() {
		defer close(woken)
		woken <- mustWait(t, n.Pods, "10.0.0.1")
	}()
	poll(t, "the request", func() bool { return n.waiters("10.0.0.1") == 1 })
	n.mkdir()
	box := sandbox{pod: "a", ips: []string{"10.0.0.1"}}
	n.write(box)
	c := <-woken
	if c == nil {
		t.FailNow() // mustWait says why
	}
	// Whatever the kernel's tick makes of the time at which it was written.
	if file, err := os.Stat(filepath.Join(n.dir, box.file())); err != nil || c.Pod.Name != "a" || !c.Since.Equal(file.ModTime()) {
		t.Errorf("woken with %+v, want since %v, %v", c, file, err)
	}
	if cni, api := n.source("cni"), n.source("api"); cni != 1 || api != 0 {
		t.Errorf("identified by cni %v, by api %v, want 1 and 0", cni, api)
	}
	// The file's last event may be read meanwhile, and that allocates too: at one time or another it is Find alone.
	poll(t, "Find without an allocation", func() bool {
		return testing.AllocsPerRun(100, func() { _, _ = n.Find(addr("10.0.0.1")) }) == 0
	})
	find(n.Pods, "10.0.0.2")
	if api := n.source("api"); api != 1 {
		t.Errorf("identified by api %v, want 1", api)
	}
	if lint, err := testutil.GatherAndLint(n.metrics); err != nil || len(lint) > 0 {
		t.Errorf("metrics: %v %v", lint, err)
	}
	e, _ := n.Explain("shop", "a")
	if !strings.Contains(fmt.Sprint(e.Steps), "requests from 10.0.0.1 are its own, since") || !cmp.Equal(e.IPs, []netip.Addr{addr("10.0.0.1")}, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })) {
		t.Errorf("explained %+v", e)
	}

	// The directory goes with all it holds, and comes back.
	n.must(os.RemoveAll(filepath.Dir(n.dir)))
	poll(t, "the end of the directory", func() bool {
		return find(n.Pods, "10.0.0.1") == "unknown" && strings.Count(n.log.String(), "no CNI results yet") == 2
	})
	n.mkdir()
	n.write(sandbox{pod: "a", ips: []string{"10.0.0.1"}})
	mustWait(t, n.Pods, "10.0.0.1")
}

// An address whose result was removed is its pod's no more, whatever the API server says, until it must have heard of that.
func TestLossEnds(t *testing.T) {
	t.Parallel()
	api := newAPIServer(t)
	shop(api)
	api.put(podOf("a", "cart", []string{"10.0.0.1"}))
	n := newCNINode(t, api).mkdir()
	n.results.delay = 20 * time.Second // every tenth of it somebody looks whether it is over
	box := sandbox{pod: "a", ips: []string{"10.0.0.1"}}
	n.write(box)
	n.run(t)
	n.synced(t)
	n.expect(t, map[string]string{"10.0.0.1": "a as cart"})
	removed := time.Now()
	n.remove(box)
	poll(t, "the loss", func() bool { return find(n.Pods, "10.0.0.1") == "unknown" })
	if e, _ := n.Explain("shop", "a"); !strings.Contains(fmt.Sprint(e.Steps), "requests from 10.0.0.1 are refused: ") {
		t.Errorf("explained %v", e.Steps)
	}
	n.Pods.mu.Lock()
	if l := n.claims.losses; len(l) != 1 || l[0].end.Before(removed.Add(n.results.delay)) {
		t.Errorf("lost %+v at %s", l, removed)
	}
	n.claims.losses[0].end = time.Now()
	n.Pods.mu.Unlock()
	poll(t, "its end", func() bool { return find(n.Pods, "10.0.0.1") == "a as cart" })
}

// A directory that others may write to, or that is not root's, is not believed until that is mended.
func TestDirectoryIsTrusted(t *testing.T) {
	t.Parallel()
	api := newAPIServer(t)
	shop(api)
	api.put(podOf("a", "cart", nil))
	box := sandbox{pod: "a", ips: []string{"10.0.0.1"}}
	n := newCNINode(t, api).mkdir()
	n.write(box)
	n.must(os.Chmod(n.dir, 0o777))
	n.run(t)
	n.synced(t)
	if got := find(n.Pods, "10.0.0.1"); got != "unknown" {
		t.Errorf("writable by all: %s", got)
	}
	n.must(os.Chmod(n.dir, 0o755))
	mustWait(t, n.Pods, "10.0.0.1")
	n.must(os.Chmod(n.dir, 0o775))
	poll(t, "the loss of trust", func() bool { return find(n.Pods, "10.0.0.1") == "unknown" })
	n.stop()

	foreign := newCNINode(t, api)
	foreign.dir, foreign.results.dir = n.dir, n.dir
	n.must(os.Chmod(n.dir, 0o700))
	foreign.results.owner++
	foreign.run(t)
	foreign.synced(t)
	if got := find(foreign.Pods, "10.0.0.1"); got != "unknown" || !strings.Contains(foreign.log.String(), "does not belong to root") {
		t.Errorf("of somebody else: %s\n%s", got, foreign.log)
	}
	if _, err := foreign.results.open(box.file()); err == nil || !strings.Contains(err.Error(), "does not belong to root") {
		t.Errorf("a file of somebody else: %v", err)
	}
}

// A flood costs bounded memory, and the newest results, which are the ones that count, survive it.
func TestFlood(t *testing.T) {
	t.Parallel()
	api := newAPIServer(t)
	shop(api)
	api.put(podOf("a", "cart", nil), podOf("b", "cart", nil))
	n := newCNINode(t, api).mkdir()
	if n.claims.max != maxResults {
		t.Errorf("%d results may be kept", n.claims.max)
	}
	const most = 512 // the writing takes the time
	n.claims.max = most
	n.write(sandbox{pod: "a", ips: []string{"10.0.0.1"}, at: time.Now().Add(time.Hour)})
	plain := string(sandbox{pod: "flooder", ips: []string{"10.1.0.0"}}.json())
	shared := string(sandbox{pod: "flooder", ips: []string{"10.1.0.0", "10.0.0.9"}}.json())
	flood := func(from, to int) {
		for i := from; i < to; i++ {
			text := plain
			if i%16 == 0 {
				text = shared
			}
			text = strings.NewReplacer("flooder", fmt.Sprint("x", i), "10.1.0.0", netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}).String()).Replace(text)
			n.must(os.WriteFile(filepath.Join(n.dir, sandbox{pod: fmt.Sprint("x", i)}.file()), []byte(text), 0o600))
		}
	}
	size := func() int {
		n.Pods.mu.Lock()
		defer n.Pods.mu.Unlock()
		return len(n.claims.byFile)
	}
	flood(0, 3*most)
	n.run(t)
	n.synced(t)
	if s := size(); s != most {
		t.Errorf("%d results are kept, want %d", s, most)
	}
	n.expect(t, map[string]string{"10.0.0.1": "a as cart"})
	flood(3*most, 5*most)
	n.write(sandbox{pod: "b", ips: []string{"10.0.0.2"}})
	mustWait(t, n.Pods, "10.0.0.2")
	if s := size(); s > most {
		t.Errorf("%d results are kept, want at most %d", s, most)
	}
	n.expect(t, map[string]string{"10.0.0.1": "a as cart", "10.0.0.2": "b as cart"})
	if lines := strings.Count(n.log.String(), "\n"); lines > 40 {
		t.Errorf("%d lines were logged", lines)
	}
}

func TestBootTime(t *testing.T) {
	boot, err := bootTime()
	if err != nil || boot.After(time.Now()) || boot.Before(time.Unix(1e9, 0)) {
		t.Errorf("booted %s, %v", boot, err)
	}
	n := newCNINode(t, newAPIServer(t))
	n.results.boot = func() (time.Time, error) { return time.Time{}, os.ErrPermission }
	before := time.Now()
	if boot := n.results.booted(); boot.Before(before) {
		t.Errorf("unknown, so it must be now: %s", boot)
	}
}

// A result from the future does not lock its pod out; one of the past second is floored.
func TestResultTime(t *testing.T) {
	api := newAPIServer(t)
	n := newCNINode(t, api).mkdir()
	for _, tt := range []struct {
		at   time.Time
		want time.Time
	}{
		{time.Unix(1767355200, 999), time.Unix(1767355200, 999)},
		{time.Now().Add(time.Hour), time.Time{}},
	} {
		box := sandbox{pod: "a", ips: []string{"10.0.0.1"}, at: tt.at}
		n.write(box)
		cl, err := n.results.open(box.file())
		if err != nil || !cl.since.Equal(tt.want) || !cl.at.Equal(tt.at) {
			t.Errorf("written %s: %+v, %v", tt.at, cl, err)
		}
	}
}

func TestParseResult(t *testing.T) {
	for name, tt := range map[string]struct {
		box  sandbox
		want []string
		err  string
	}{
		"1.0.0":                     {box: sandbox{ips: []string{"10.0.0.1", "fd00::1", "127.0.0.1", "::1", "fe80::1", "169.254.172.3"}}, want: []string{"10.0.0.1", "fd00::1", "169.254.172.3"}},
		"0.2.0":                     {box: sandbox{result: `{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.1/24"},"ip6":{"ip":"fd00::1/64"}}`}, want: []string{"10.0.0.1", "fd00::1"}},
		"0.3.1":                     {box: sandbox{result: `{"cniVersion":"0.3.1","ips":[{"version":"4","address":"::ffff:10.0.0.1/120"},{"address":"10.0.0.1/24"}]}`}, want: []string{"10.0.0.1"}},
		"the node's end":            {box: sandbox{result: `{"interfaces":[{"name":"cni0"}],"ips":[{"interface":0,"address":"10.0.0.254/24"}]}`}},
		"interface of its own mind": {box: sandbox{result: `{"ips":[{"interface":-7,"address":"10.0.0.1/24"},{"interface":9,"address":"10.0.0.2/24"}]}`}, want: []string{"10.0.0.1", "10.0.0.2"}},
		"no address":                {box: sandbox{result: `{"ips":[{"address":"10.0.0.1"}]}`}, err: "address"},
		"no result":                 {box: sandbox{result: `null`}},
		"too many":                  {box: sandbox{result: `{"ips":[` + strings.TrimSuffix(strings.Repeat(`{"address":"10.0.0.%d/24"},`, 40), ",") + `]}`}, err: "more than"},
	} {
		tt.box.pod = "a"
		for i := 1; strings.Contains(tt.box.result, "%d"); i++ {
			tt.box.result = strings.Replace(tt.box.result, "%d", fmt.Sprint(i), 1)
		}
		r, err := parseResult(tt.box.file(), tt.box.json())
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v, want %s", name, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, ip := range r.ips {
			got = append(got, ip.String())
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || r.uid != "uid-a" || r.namespace != "shop" || r.name != "a" || r.network != "bridge" {
			t.Errorf("%s: %+v (-want +got)\n%s", name, r, diff)
		}
	}
	for name, data := range map[string]string{
		"another kind":     `{"kind":"cniCacheV2"}`,
		"the old format":   `{"cniVersion":"0.3.1","ips":[]}`,
		"not of a pod":     `{"kind":"cniCacheV1","containerId":"c","networkName":"n","ifName":"i"}`,
		"without its UID":  `{"kind":"cniCacheV1","containerId":"c","networkName":"n","ifName":"i","cniArgs":[["K8S_POD_NAMESPACE","x"],["K8S_POD_NAME","y"]]}`,
		"contradicting":    `{"kind":"cniCacheV1","containerId":"c","networkName":"n","ifName":"i","cniArgs":[["K8S_POD_UID","x"],["K8S_POD_UID","y"]]}`,
		"endless":          `{"kind":"cniCacheV1","containerId":"c","networkName":"n","ifName":"i","cniArgs":[["K8S_POD_UID","` + strings.Repeat("x", 254) + `"]]}`,
		"null":             `null`,
		"a list":           `[]`,
		"of another shape": `{"kind":"cniCacheV1","result":{"ips":"10.0.0.1"}}`,
	} {
		if r, err := parseResult("n-c-i", []byte(data)); err == nil {
			t.Errorf("%s: %+v, want an error", name, r)
		}
	}
	agreeing := `{"kind":"cniCacheV1","containerId":"c","networkName":"n","ifName":"i","cniArgs":[["K8S_POD_UID","u"],["K8S_POD_NAME","y"],["K8S_POD_NAMESPACE","x"],["K8S_POD_UID","u"]]}`
	if _, err := parseResult("n-c-i", []byte(agreeing)); err != nil {
		t.Errorf("as Multus writes it: %v", err)
	}
}

// A result file may hold anything.
func FuzzResult(f *testing.F) {
	f.Add("bridge-box-a-eth0", sandbox{pod: "a", ips: []string{"10.0.0.1", "fd00::1"}}.json())
	f.Add("bridge-box-a-eth0", sandbox{pod: "a", result: `{"ip4":{"ip":"10.0.0.1/24"},"ip6":{"ip":"fd00::1/64"}}`}.json())
	f.Add("n-c-i", []byte(`{"kind":"cniCacheV1","containerId":"c","networkName":"n","ifName":"i","cniArgs":[["K8S_POD_UID"]]}`))
	f.Add("", []byte(`{"result":{"ips":[{"interface":-1}],"interfaces":[{}]}}`))
	f.Fuzz(func(t *testing.T, file string, data []byte) {
		r, err := parseResult(file, data)
		if (r == nil) == (err == nil) {
			t.Fatalf("%+v, %v: want one of the two", r, err)
		}
		if r == nil {
			return
		}
		if r.uid == "" || r.name == "" || r.namespace == "" || len(r.ips) > maxResultIPs {
			t.Fatalf("%+v", r)
		}
		for _, ip := range r.ips {
			if !ip.IsValid() || ip.Is4In6() || ip.IsLoopback() {
				t.Fatalf("%s", ip)
			}
		}
	})
}

// Without inotify the directory is read again and again, and that is said: a pod that takes all that the node has must not make the
// daemon go by the API server alone.
func TestWithoutInotify(t *testing.T) {
	a := newAPIServer(t)
	shop(a)
	n := newCNINode(t, a).mkdir()
	n.results.watcher = func() (*fsnotify.Watcher, error) { return nil, syscall.EMFILE }
	a.put(podOf("a", "cart", []string{"10.0.0.1"}), podOf("b", "cart", nil))
	n.write(sandbox{pod: "a", ips: []string{"10.0.0.1"}})
	n.run(t)
	poll(t, "the first", func() bool { return find(n.Pods, "10.0.0.1") == "a as cart" })
	n.remove(sandbox{pod: "a"})
	poll(t, "its loss", func() bool { return find(n.Pods, "10.0.0.1") == "unknown" })
	n.write(sandbox{pod: "b", ips: []string{"10.0.0.1"}})
	poll(t, "the next, of which the API server has not told", func() bool { return find(n.Pods, "10.0.0.1") == "b as cart" })
	n.must(os.RemoveAll(n.dir))
	poll(t, "the API server's word", func() bool { return find(n.Pods, "10.0.0.1") == "a as cart" })
	if !strings.Contains(n.log.String(), "read again and again") {
		t.Errorf("not said:\n%s", n.log)
	}
}
