package scenarios

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/scenarios/first"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// update takes the report into the documentation.
var update = flag.Bool("update", false, "write docs/first-request.md and .svg")

// plan is how many pods start at once: in bursts of 30 and 80 by turns, then so many one after the other.
func plan(bursts, singles int) []int {
	var sizes []int
	for i := range bursts {
		sizes = append(sizes, []int{30, 80}[i%2])
	}
	return append(sizes, slices.Repeat([]int{1}, singles)...)
}

// heldLimit is how long the daemon may take to know the pods of 99 of 100 requests.
const heldLimit = 5 * time.Millisecond

// Five hundred short-lived pods, one at a time, 30 and 80 at once, each of which asks once, as its first instruction and with a
// second for each request. With the node's CNI results all of them are served. The API server alone cannot know their IPs in
// time: those that it serves get their own; half as many pods show it.
func TestScenarioBursts(t *testing.T) {
	var cni, informer []first.Burst
	t.Run("CNI results", func(t *testing.T) {
		s := beginScenario(t, 6*time.Minute)
		s.install()
		var d first.Daemon
		cni, d = s.bursts("bursts", first.CNI, plan(9, 40))
		if pods := cni[0].Pods + cni[1].Pods + cni[2].Pods; pods < 500 {
			t.Errorf("%d pods, fewer than 500", pods)
		}
		for _, b := range cni {
			if b.Served != b.Pods {
				t.Errorf("%d of %d pods served, %d at once; the others: %v", b.Served, b.Pods, b.AtOnce, b.Failures)
			}
		}
		// Requests that found their pod known were not held. Of those that were, and of how long answers took, the figures tell; on a
		// machine that starts 80 pods at once they are those of its scheduler.
		if late := d.Held.Over(heldLimit); late > 0.01*(d.ByCNI+d.ByAPI) {
			t.Errorf("%.0f of %.0f requests were held for more than %s", late, d.ByCNI+d.ByAPI, heldLimit)
		}
		if d.ByCNI < 1000 { // a list and a document each
			t.Errorf("%.0f requests were told by the CNI results: something else served the pods", d.ByCNI)
		}
	})
	t.Run("API server alone", func(t *testing.T) {
		s := beginScenario(t, 6*time.Minute)
		s.install(`flags.cni-results=""`)
		var d first.Daemon
		informer, d = s.bursts("bursts-informer", first.Informer, plan(5, 10))
		if d.ByCNI != 0 {
			t.Errorf("%.0f requests were told by CNI results, which are off", d.ByCNI)
		}
	})
	for i := range min(len(cni), len(informer)) {
		if cni[i].Share() < informer[i].Share() {
			t.Errorf("%d at once: %.1f %% served with the CNI results, %.1f %% without", cni[i].AtOnce, cni[i].Share(), informer[i].Share())
		}
	}
}

// bursts runs the plan and reports what came of it, by size.
func (s *scenario) bursts(ns, source string, plan []int) ([]first.Burst, first.Daemon) {
	s.Helper()
	roles := []string{s.role(ns + "/red"), s.role(ns + "/green"), s.role(ns + "/blue")}
	s.newNamespace(ns, allowed(roles...))
	for i, role := range roles {
		s.serviceAccount(ns, fmt.Sprint("app", i), role)
	}
	before := s.metrics()
	all := map[int]*first.Burst{}
	for _, size := range first.Sizes {
		all[size] = &first.Burst{Source: source, AtOnce: size, Failures: map[string]int{}}
	}
	for n, size := range plan {
		b := all[size]
		of := func(pod int) int { return (n + pod) % len(roles) }
		pods := s.burst(ns, n, size, func(p *podSpec, i int) {
			p.account, p.args = fmt.Sprint("app", of(i)), []string{"once"}
			if size == 1 {
				p.node = 1 + n%2
			}
		})
		for i, r := range pods {
			s.count(b, r, roles[of(i)])
		}
	}
	after := s.metrics().Since(before)
	d := first.Daemon{
		Source: source, Held: after.Histogram("imdsgate_identify_wait_seconds"),
		Answers: after.Histogram("imdsgate_http_request_duration_seconds", `handler="token"`, `handler="role_list"`, `handler="document"`),
		ByCNI:   after.Sum("imdsgate_identify_source_total", `source="cni"`), ByAPI: after.Sum("imdsgate_identify_source_total", `source="api"`),
	}
	var list []first.Burst
	for _, size := range first.Sizes {
		b := all[size]
		slices.Sort(b.Milliseconds)
		s.figures("%s, %d at once: %d of %d served (%.1f %%), %d wrong; p50 %.1f ms p90 %.1f ms p99 %.1f ms max %.1f ms; %v (for comparison: %s)",
			source, size, b.Served, b.Pods, b.Share(), b.Wrong, b.Quantile(.5), b.Quantile(.9), b.Quantile(.99), b.Quantile(1), b.Failures, first.Peers(size))
		list = append(list, *b)
	}
	s.figures("%s: of %.0f requests %.0f were told by the CNI results, %.0f by the API server; %.0f had been held, p99 within %v s; %.0f answers, p99 within %v s",
		source, d.ByCNI+d.ByAPI, d.ByCNI, d.ByAPI, d.Held.Count, d.Held.Within(.99), d.Answers.Count, d.Answers.Within(.99))
	s.report(func(r *first.Report) { r.SetBursts(d, list) })
	return list, d
}

// burst starts pods at once and returns what they found, by their number.
func (s *scenario) burst(ns string, n, size int, edit func(*podSpec, int)) []sequence.Result {
	s.Helper()
	label := fmt.Sprint("burst=", n)
	number := map[string]int{}
	for i := range size {
		p := podSpec{namespace: ns, name: fmt.Sprintf("b%d-%d", n, i), labels: map[string]string{"burst": fmt.Sprint(n)}}
		edit(&p, i)
		number[p.name] = i
		s.create(p)
	}
	found := make([]sequence.Result, size)
	open := size
	s.must(s.eachPod(ns, label, func(p *corev1.Pod) bool {
		if i := number[p.Name]; found[i].Kind == "" && ended(p) {
			r, err := answer(p)
			s.must(err)
			found[i] = r
			open--
		}
		return open == 0
	}))
	zero := int64(0)
	s.must(s.kube.CoreV1().Pods(ns).DeleteCollection(s.ctx, metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{LabelSelector: label}))
	return found
}

// count adds what a pod found to those that were started as it was.
func (s *scenario) count(b *first.Burst, r sequence.Result, role string) {
	s.Helper()
	b.Pods++
	switch {
	case r.Kind != sequence.OK:
		b.Failures[first.Failure(r)]++
		if r.Kind == sequence.Cut {
			s.Errorf("a connection was cut: %s", r.Brief())
		}
	case !s.own(r.AccessKeyID, role):
		b.Wrong++
	default:
		b.Served++
		b.Milliseconds = append(b.Milliseconds, float64(r.Took.Microseconds())/1000)
	}
}

// own reports whether credentials are those of a role, and fails if not.
func (s *scenario) own(key, role string) bool {
	s.Helper()
	o := s.owner(key)
	if o.RoleARN != role || o.NodeIndex != 0 {
		s.Errorf("WRONG CREDENTIALS: of %s (node %d) instead of %s", o.RoleARN, o.NodeIndex, role)
		return false
	}
	return true
}

// metrics are the samples of all nodes' daemons, added up.
func (s *scenario) metrics() first.Metrics {
	s.Helper()
	m := first.Metrics{}
	for node := 1; node <= 2; node++ {
		text := s.onNode(node, "curl", "-sf", "--noproxy", "*", "--retry", "10", "--retry-delay", "1", "--retry-connrefused", fmt.Sprintf("http://%s:9181/metrics", control.NodeIP(node)))
		s.must(m.Read(strings.NewReader(text)))
	}
	return m
}

// report changes the report of this run and, with -update, that of the documentation.
func (s *scenario) report(change func(*first.Report)) {
	s.Helper()
	const out, docs = "../out", "../../docs"
	s.must(first.Write(out, change))
	if !*update {
		return
	}
	s.must(os.MkdirAll(docs, 0o755))
	for _, file := range []string{"first-request.md", "first-request.svg"} {
		b, err := os.ReadFile(filepath.Join(out, file))
		s.must(err)
		s.must(os.WriteFile(filepath.Join(docs, file), b, 0o644))
	}
}

// eachPod hands over every state of the selection's pods until done.
func (s *scenario) eachPod(ns, labels string, done func(*corev1.Pod) bool) error {
	ctx, cancel := context.WithTimeout(s.ctx, 3*time.Minute)
	defer cancel()
	for ctx.Err() == nil {
		w, err := s.kube.CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{LabelSelector: labels})
		if err != nil {
			return err
		}
		for e := range w.ResultChan() {
			if p, ok := e.Object.(*corev1.Pod); ok && done(p) {
				w.Stop()
				return nil
			}
		}
		w.Stop()
	}
	return ctx.Err()
}
