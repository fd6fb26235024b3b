package pods

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	"github.com/imdsgate/imdsgate/proxy"
)

const (
	nodeName = "node-1"
	roleARN  = "arn:aws:iam::123456789012:role/cart"
)

func deadline() <-chan time.Time { return time.After(20 * time.Second) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// podOf returns a running pod; edits change it.
func podOf(name, serviceAccount string, ips []string, edits ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name)},
		Spec: corev1.PodSpec{
			NodeName: nodeName, ServiceAccountName: serviceAccount, Containers: []corev1.Container{{Name: "main"}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	if len(ips) > 0 {
		p.Status.PodIP = ips[0]
	}
	for _, edit := range edits {
		edit(p)
	}
	return p
}

func phase(phase corev1.PodPhase) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Status.Phase = phase }
}

func terminating(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} }

func ended(p *corev1.Pod) {
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
}

func hostNetwork(p *corev1.Pod) { p.Spec.HostNetwork = true }

func uid(uid string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.UID = types.UID(uid) } }

func onNode(node string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.NodeName = node } }

func env(name string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: name}} }
}

func annotated(kv ...string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations = annotations(kv...) }
}

func annotations(kv ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return m
}

func account(name string, kv ...string) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{
		Namespace: "shop", Name: name, UID: types.UID("sa-" + name), Annotations: annotations(kv...),
	}}
}

func namespace(name string, kv ...string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("ns-" + name), Annotations: annotations(kv...)}}
}

// harness is a running Pods against a fake API server.
type harness struct {
	*apiServer
	*Pods
	log     *lockedBuffer
	metrics *prometheus.Registry
	stop    func() // ends Run and waits for it

	cmu     sync.Mutex
	changes map[string]int // OnChange, by namespace/service account
	flushes int
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func testPolicy() *proxy.Policy {
	return &proxy.Policy{
		Issuer: proxy.IssuerAssumeRole, NamespacePolicy: "off", PodAnnotations: true, SessionDuration: time.Hour, Node: nodeName,
		BaseRoleARN: "arn:aws:iam::123456789012:role/",
	}
}

func newHarness(t *testing.T, a *apiServer, policy *proxy.Policy) *harness {
	h := &harness{apiServer: a, log: &lockedBuffer{}, metrics: prometheus.NewRegistry(), changes: map[string]int{}}
	var err error
	h.Pods, err = New(Options{
		Config: a.config(), Node: nodeName, Policy: policy, Metrics: h.metrics,
		Log: slog.New(slog.NewTextHandler(h.log, nil)),
		OnChange: func(namespace, serviceAccount string) {
			h.cmu.Lock()
			h.changes[namespace+"/"+serviceAccount]++
			h.cmu.Unlock()
			a.locked(func() {}) // wakes wait
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	h.backoff = &wait.Backoff{Duration: 20 * time.Millisecond, Factor: 1, Steps: 1000, Cap: time.Second}
	return h
}

// start runs Pods until the test ends.
func start(t *testing.T, a *apiServer, policy *proxy.Policy) *harness {
	t.Helper()
	h := newHarness(t, a, policy)
	h.run(t)
	return h
}

func (h *harness) run(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	var once sync.Once
	h.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("Run: %v", err)
				}
			case <-deadline():
				t.Error("Run does not return")
			}
		})
	}
	t.Cleanup(h.stop)
}

func (h *harness) synced(t *testing.T) *harness {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := h.WaitSynced(ctx); err != nil {
		t.Fatalf("not synced: %v\n%s", err, h.log)
	}
	return h
}

// flush returns when the pod events so far were applied: another one, of a static pod, follows them in the same stream.
func (h *harness) flush() {
	h.t.Helper()
	h.cmu.Lock()
	h.flushes++
	seq, before := fmt.Sprint(h.flushes), h.changes["sentinel/"]
	h.cmu.Unlock()
	h.put(podOf("sentinel", "", nil, annotated(corev1.MirrorPodAnnotationKey, "", proxy.AnnotationPodRole, seq), func(p *corev1.Pod) {
		p.Namespace = "sentinel"
	}))
	h.wait("the sentinel", func() bool { return h.told("sentinel/") > before })
}

func (h *harness) told(name string) int {
	h.cmu.Lock()
	defer h.cmu.Unlock()
	return h.changes[name]
}

// until returns when a service account's pods were decided anew and cond holds.
func (h *harness) until(what string, cond func() bool) {
	h.t.Helper()
	h.wait(what, cond)
}

// poll is until for what no event tells of.
func poll(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain for: ", what)
		}
	}
}

// find says in a word what Find says.
func find(p *Pods, ip string) string {
	c, err := p.Find(addr(ip))
	switch {
	case errors.Is(err, proxy.ErrNotSynced):
		return "not synced"
	case errors.Is(err, proxy.ErrUnknownIP):
		return "unknown"
	case errors.Is(err, proxy.ErrAmbiguousIP):
		return "ambiguous"
	case errors.Is(err, proxy.ErrIncomplete):
		return "incomplete"
	case err != nil:
		return err.Error()
	case c.Refusal != nil:
		return fmt.Sprintf("%s refused(%d)", c.Pod.Name, c.Refusal.Kind)
	}
	return c.Pod.Name + " as " + c.Grant.Role
}

// expect compares what Find says about IPs.
func (h *harness) expect(t *testing.T, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for ip := range want {
		got[ip] = find(h.Pods, ip)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Find (-want +got):\n%s", d)
	}
}

func shop(a *apiServer) { a.put(namespace("shop"), account("cart", proxy.AnnotationRoleARN, roleARN)) }

// Every IP of every pod that can be a caller is found, and no other; with and without watch-list.
func TestFindByIP(t *testing.T) {
	for name, watchList := range map[string]bool{"watch-list": true, "list and watch": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			a.watchList = watchList
			shop(a)
			a.put(
				podOf("dual", "cart", []string{"10.0.0.1", "fd00::1"}),
				podOf("mapped", "cart", []string{"::ffff:10.0.0.9"}),
				podOf("old-field", "cart", nil, func(p *corev1.Pod) { p.Status.PodIP = "10.0.0.2" }),
				podOf("host", "cart", []string{"192.0.2.1"}, hostNetwork),
				podOf("succeeded", "cart", []string{"10.0.0.3"}, phase(corev1.PodSucceeded)),
				podOf("failed", "cart", []string{"10.0.0.4"}, phase(corev1.PodFailed)),
				podOf("elsewhere", "cart", []string{"10.0.0.5"}, onNode("node-2")),
				podOf("plain", "default", []string{"10.0.0.6"}),
				podOf("garbage", "cart", []string{"no address", "", "10.0.0.7/24", "10.0.0.8"}),
				podOf("static", "cart", []string{"10.0.0.10"}, annotated(corev1.MirrorPodAnnotationKey, "x", proxy.AnnotationPodRole, roleARN)),
			)
			h := newHarness(t, a, testPolicy())
			h.expect(t, map[string]string{"10.0.0.1": "not synced"})
			h.run(t)
			h.synced(t).expect(t, map[string]string{
				"10.0.0.1": "dual as cart", "fd00::1": "dual as cart", "::ffff:10.0.0.1": "dual as cart",
				"10.0.0.9": "mapped as cart", "10.0.0.2": "old-field as cart",
				"192.0.2.1": "unknown", "10.0.0.3": "unknown", "10.0.0.4": "unknown", "10.0.0.5": "unknown", "10.0.0.99": "unknown",
				"10.0.0.6": "plain refused(0)", "10.0.0.7": "unknown", "10.0.0.8": "garbage as cart", "10.0.0.10": "static refused(0)",
			})
			if n := testutil.ToFloat64(gauge{h.metrics}); n != 6 {
				t.Errorf("imdsgate_pods = %v, want 6", n)
			}
			if problems, err := testutil.GatherAndLint(h.metrics); err != nil || len(problems) > 0 {
				t.Errorf("metrics: %v %v", problems, err)
			}
		})
	}
}

// gauge lets testutil read imdsgate_pods of a registry.
type gauge struct{ r *prometheus.Registry }

func (g gauge) Describe(chan<- *prometheus.Desc) {}

func (g gauge) Collect(c chan<- prometheus.Metric) {
	families, err := g.r.Gather()
	if err != nil {
		return
	}
	for _, f := range families {
		if f.GetName() != "imdsgate_pods" {
			continue
		}
		for _, m := range f.Metric {
			c <- prometheus.MustNewConstMetric(prometheus.NewDesc(f.GetName(), f.GetHelp(), nil, nil), prometheus.GaugeValue, m.GetGauge().GetValue())
		}
	}
}

// Who holds an IP, as it goes from pod to pod.
func TestHolder(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	h := start(t, a, testPolicy()).synced(t)
	ip := []string{"10.0.0.1"}
	step := func(name, want string, objects ...apiObject) {
		t.Helper()
		a.put(objects...)
		h.flush()
		if got := find(h.Pods, ip[0]); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	a.put(podOf("stays", "cart", nil)) // so that the service account stays known
	a.put(podOf("a", "cart", ip))
	mustWait(t, h.Pods, ip[0])
	step("single", "a as cart")
	step("terminating keeps access", "a as cart", podOf("a", "cart", ip, terminating))
	step("the one that stays", "b as cart", podOf("b", "cart", ip))
	step("two that stay", "ambiguous", podOf("c", "cart", ip))
	step("one of them is going", "b as cart", podOf("c", "cart", ip, terminating))
	step("three are going", "ambiguous", podOf("b", "cart", ip, terminating))
	step("one has ended", "ambiguous", podOf("a", "cart", ip, terminating, ended))
	step("a phase ends too", "c as cart", podOf("b", "cart", ip, terminating, phase(corev1.PodFailed)))
	a.delete(podOf("c", "cart", ip))
	step("none", "unknown")
	step("moved to another IP", "unknown", podOf("d", "cart", []string{"10.0.0.2"}))
	step("and back, under the same name but another UID", "d as cart", podOf("d", "cart", ip, uid("second")))
	if !strings.Contains(h.log.String(), "same IP") {
		t.Error("ambiguity is not logged")
	}
}

func mustWait(t *testing.T, p *Pods, ip string) *proxy.Caller {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := p.Wait(ctx, addr(ip))
	if err != nil {
		t.Fatalf("Wait(%s): %v", ip, err)
	}
	return c
}

// A terminating pod has access until all its containers have ended, its sidecars included.
func TestContainersEnded(t *testing.T) {
	running := corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	over := corev1.ContainerStatus{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
	waiting := corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}}
	type cs = []corev1.ContainerStatus
	for name, tt := range map[string]struct {
		status corev1.PodStatus
		want   bool
	}{
		"not started":      {corev1.PodStatus{}, false},
		"all over":         {corev1.PodStatus{ContainerStatuses: cs{over, over}}, true},
		"one runs":         {corev1.PodStatus{ContainerStatuses: cs{over, running}}, false},
		"one waits":        {corev1.PodStatus{ContainerStatuses: cs{over, waiting}}, false},
		"a sidecar runs":   {corev1.PodStatus{ContainerStatuses: cs{over}, InitContainerStatuses: cs{over, running}}, false},
		"sidecar is over":  {corev1.PodStatus{ContainerStatuses: cs{over}, InitContainerStatuses: cs{over}}, true},
		"somebody debugs":  {corev1.PodStatus{ContainerStatuses: cs{over}, EphemeralContainerStatuses: cs{running}}, false},
		"succeeded anyway": {corev1.PodStatus{ContainerStatuses: cs{running}, Phase: corev1.PodSucceeded}, true},
	} {
		p := podOf("a", "cart", nil, terminating)
		p.Status = tt.status
		if got := podFacts(p); got.ended != tt.want {
			t.Errorf("%s: ended = %v, want %v", name, got.ended, tt.want)
		}
		p.DeletionTimestamp = nil
		if got := podFacts(p); got.ended != (tt.status.Phase == corev1.PodSucceeded) {
			t.Errorf("%s, not terminating: ended = %v: containers may be started again", name, got.ended)
		}
	}
}

// A request waits for the pod's IP, for its service account and namespace, and for an ambiguity to end; and no longer.
func TestWait(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(podOf("other", "cart", []string{"10.0.0.2"}), podOf("twin", "cart", []string{"10.0.0.2"}))
	h := start(t, a, testPolicy()).synced(t)
	type result struct {
		c   *proxy.Caller
		err error
	}
	hold := func(ctx context.Context, ip string) <-chan result {
		done := make(chan result, 1)
		go func() {
			c, err := h.Wait(ctx, addr(ip))
			done <- result{c, err}
		}()
		poll(t, "a waiter on "+ip, func() bool { return h.waiters(ip) > 0 })
		return done
	}
	served := func(r result, name string) {
		t.Helper()
		if r.err != nil || r.c.Pod.Name != name || r.c.Grant == nil {
			t.Errorf("Wait = %+v, %v; want %s with a role", r.c, r.err, name)
		}
	}

	late := hold(t.Context(), "::ffff:10.0.0.1")
	a.put(podOf("late", "cart", nil, phase(corev1.PodPending), onNode("")))
	a.put(podOf("late", "cart", nil, phase(corev1.PodPending)))
	a.put(podOf("late", "cart", []string{"10.0.0.1"}))
	served(<-late, "late")

	twin := hold(t.Context(), "10.0.0.2")
	h.expect(t, map[string]string{"10.0.0.2": "ambiguous"})
	a.delete(podOf("other", "cart", nil))
	served(<-twin, "twin")

	a.set(func() { a.held["serviceaccounts"] = true })
	a.put(account("slow", proxy.AnnotationRoleARN, roleARN), podOf("slow", "slow", []string{"10.0.0.3"}))
	h.flush()
	h.expect(t, map[string]string{"10.0.0.3": "incomplete"})
	slow := hold(t.Context(), "10.0.0.3")
	a.set(func() { a.held["serviceaccounts"] = false })
	served(<-slow, "slow")

	ctx, cancel := context.WithCancel(t.Context())
	never := hold(ctx, "10.0.0.4")
	cancel()
	if r := <-never; !errors.Is(r.err, proxy.ErrUnknownIP) {
		t.Errorf("Wait = %v, want ErrUnknownIP", r.err)
	}
	h.waiting.mu.Lock()
	defer h.waiting.mu.Unlock()
	if len(h.waiting.on) != 0 {
		t.Errorf("waiters are left: %v", h.waiting.on)
	}
}

func (h *harness) waiters(ip string) int {
	h.waiting.mu.Lock()
	defer h.waiting.mu.Unlock()
	if on := h.waiting.on[addr(ip).Unmap()]; on != nil {
		return on.n
	}
	return 0
}

// Another node's pod is nobody here, even if the API server says so.
func TestForeignPod(t *testing.T) {
	h := newHarness(t, newAPIServer(t), testPolicy())
	h.update(func(c *change) { h.upsert(c, podFacts(podOf("b", "", []string{"10.0.0.2"})), time.Now(), time.Time{}) })
	h.expect(t, map[string]string{"10.0.0.2": "not synced"}) // a pod is not all pods
	fill(h.Pods, 0)
	for _, node := range []string{"node-2", "", nodeName, "node-2"} {
		h.update(func(c *change) {
			h.upsert(c, podFacts(podOf("a", "", []string{"10.0.0.1"}, onNode(node))), time.Now(), time.Time{})
		})
		if got, here := find(h.Pods, "10.0.0.1"), node == nodeName; (got != "unknown") != here || len(h.pods) > 0 != here {
			t.Errorf("pod of node %q: %s", node, got)
		}
	}
}

// What a field selector should have kept away counts for nothing.
func TestSelectorsAreNotTrusted(t *testing.T) {
	for name, watchList := range map[string]bool{"watch-list": true, "list and watch": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			a.sloppy, a.watchList = true, watchList
			shop(a)
			other := account("cart", proxy.AnnotationRoleARN, roleARN[:31]+"other")
			other.Namespace = "elsewhere"
			a.put(account("aaa"), account("zzz"), other, namespace("aaa", proxy.AnnotationAllowedRoles, "["), namespace("zzz", proxy.AnnotationAllowedRoles, "["),
				podOf("a", "cart", []string{"10.0.0.1"}), podOf("far", "cart", []string{"10.0.0.2"}, onNode("node-2")))
			policy := testPolicy()
			policy.NamespacePolicy = "auto"
			a.put(namespace("shop", proxy.AnnotationAllowedRoles, `["*"]`))
			h := start(t, a, policy).synced(t)
			before := h.told("shop/cart")
			other.Annotations[proxy.AnnotationExternalID] = "other"
			a.put(other, account("zzz", proxy.AnnotationRoleARN, roleARN[:31]+"zzz"), namespace("zzz"))
			a.delete(account("aaa"), namespace("aaa"), podOf("far", "cart", nil))
			a.put(account("cart", proxy.AnnotationRoleARN, roleARN, proxy.AnnotationExternalID, "own")) // follows in the same stream
			h.until("the last", func() bool { return h.told("shop/cart") > before })
			h.flush()
			h.expect(t, map[string]string{"10.0.0.1": "a as cart", "10.0.0.2": "unknown"})
			if n := h.told("shop/cart"); n != before+1 {
				t.Errorf("%d changes for one", n-before)
			}
		})
	}
}

// The same object again, as after a new list, changes nothing.
func TestUnchanged(t *testing.T) {
	h := newHarness(t, newAPIServer(t), testPolicy())
	fill(h.Pods, 3)
	ip := addr("10.0.1.1")
	before, err := h.Find(ip)
	if err != nil {
		t.Fatal(err)
	}
	told := h.told("shop/sa-1")
	name := types.NamespacedName{Namespace: "shop", Name: "sa-1"}
	h.update(func(c *change) {
		h.seen(c, h.accounts[name], accountFacts(account("sa-1", proxy.AnnotationRoleARN, roleARN, "other", "x")))
	})
	h.update(func(c *change) {
		h.seen(c, h.namespaces[types.NamespacedName{Name: "shop"}], namespaceFacts(namespace("shop")))
	})
	if after, _ := h.Find(ip); after != before || h.told("shop/sa-1") != told {
		t.Errorf("decided anew, told %d times", h.told("shop/sa-1")-told)
	}
}

// Only the waiters of the IP that changed are woken.
func TestWakesOnlyThoseConcerned(t *testing.T) {
	t.Parallel()
	h := start(t, newAPIServer(t), testPolicy()).synced(t)
	w := h.waiting.join(addr("10.0.0.77"))
	defer h.waiting.leave(addr("10.0.0.77"), w)
	h.put(podOf("a", "", []string{"10.0.0.1"}))
	h.flush()
	select {
	case <-w.woken:
		t.Error("woken by another IP's pod")
	default:
	}
}

// What the decision rests on is confirmed absent or present before anything is decided, and a change is effective with its
// event.
func TestDecisionFollowsObjects(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(podOf("a", "cart", []string{"10.0.0.1"}))
	policy := testPolicy()
	policy.NamespacePolicy = "auto"
	h := start(t, a, policy).synced(t)
	step := func(name, want string, f func()) {
		t.Helper()
		f()
		h.until(name, func() bool { return find(h.Pods, "10.0.0.1") == want })
	}
	const noRole, denied, invalid = "a refused(0)", "a refused(1)", "a refused(2)"
	h.expect(t, map[string]string{"10.0.0.1": noRole})
	step("annotated, not permitted", denied, func() { a.put(account("cart", proxy.AnnotationRoleARN, roleARN)) })
	step("permitted", "a as cart", func() { a.put(namespace("shop", proxy.AnnotationAllowedRoles, `["*"]`)) })
	step("another role", "a as basket", func() { a.put(account("cart", proxy.AnnotationRoleARN, roleARN[:31]+"basket")) })
	step("malformed", invalid, func() { a.put(account("cart", proxy.AnnotationRoleARN, "arn:oops")) })
	step("64 KiB of it", invalid, func() { a.put(account("cart", proxy.AnnotationRoleARN, roleARN+strings.Repeat("x", 1<<16))) })
	step("annotation removed", noRole, func() { a.put(account("cart")) })
	step("the pod's own", "a as own", func() { a.put(podOf("a", "cart", []string{"10.0.0.1"}, annotated(proxy.AnnotationPodRole, "own"))) })
	step("the pod's removed", noRole, func() { a.put(podOf("a", "cart", []string{"10.0.0.1"})) })
	step("annotated again", "a as cart", func() { a.put(account("cart", proxy.AnnotationRoleARN, roleARN)) })
	step("account deleted", noRole, func() { a.delete(account("cart")) })
	step("account recreated", "a as cart", func() { a.put(account("cart", proxy.AnnotationRoleARN, roleARN)) })
	step("pattern is not readable", denied, func() { a.put(namespace("shop", proxy.AnnotationAllowedRoles, `[`)) })
	step("permission restored", "a as cart", func() { a.put(namespace("shop", proxy.AnnotationPermitted, `.*`)) })
	step("namespace deleted", denied, func() { a.delete(namespace("shop")) })
}

// A namespace without an annotation permits everything with web identity. One that does not exist permits nothing: it cannot be that
// of a pod, so somebody is wrong about it, and it may have had an annotation.
func TestAbsentNamespacePermitsNothing(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(podOf("a", "cart", []string{"10.0.0.1"}), account("cart", proxy.AnnotationRoleARN, roleARN), namespace("shop"))
	policy := testPolicy()
	policy.Issuer, policy.NamespacePolicy, policy.Audiences = proxy.IssuerWebIdentity, "auto", []string{"sts.amazonaws.com"}
	h := start(t, a, policy).synced(t)
	h.expect(t, map[string]string{"10.0.0.1": "a as cart"})
	a.put(namespace("shop", proxy.AnnotationAllowedRoles, `["arn:nothing"]`))
	h.until("not permitted", func() bool { return find(h.Pods, "10.0.0.1") == "a refused(1)" })
	a.delete(namespace("shop"))
	h.until("absent", func() bool {
		e, _ := h.Explain("shop", "a")
		return strings.Contains(fmt.Sprint(e.Steps), "namespace shop: does not exist")
	})
	h.expect(t, map[string]string{"10.0.0.1": "a refused(1)"})
}

// OnChange tells of pods that came and went and of what decides, not of status.
func TestOnChange(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(account("quiet"))
	h := start(t, a, testPolicy()).synced(t)
	step := func(name, who string, want bool, f func()) {
		t.Helper()
		before, quiet := h.told(who), h.told("shop/quiet")
		f()
		if want {
			h.until(name, func() bool { return h.told(who) > before })
		}
		h.flush()
		if !want && h.told(who) != before {
			t.Errorf("%s: told", name)
		}
		if h.told("shop/quiet") != quiet {
			t.Errorf("%s: told of another service account", name)
		}
	}
	ip := []string{"10.0.0.1"}
	step("other account's pod", "shop/other", true, func() { a.put(podOf("q", "other", nil)) })
	step("new pod", "shop/cart", true, func() { a.put(podOf("a", "cart", nil, phase(corev1.PodPending))) })
	h.until("decided", func() bool {
		n := 0
		for range h.Live() {
			n++
		}
		return n == 1
	})
	step("its IP", "shop/cart", false, func() { a.put(podOf("a", "cart", ip)) })
	mustWait(t, h.Pods, ip[0])
	step("a label", "shop/cart", false, func() {
		a.put(podOf("a", "cart", ip, func(p *corev1.Pod) { p.Labels = map[string]string{"a": "b"} }))
	})
	step("an annotation of others", "shop/cart", false, func() { a.put(podOf("a", "cart", ip, annotated("x", "y"))) })
	step("its role annotation", "shop/cart", true, func() { a.put(podOf("a", "cart", ip, annotated(proxy.AnnotationPodRole, "y"))) })
	step("terminating", "shop/cart", false, func() { a.put(podOf("a", "cart", ip, annotated(proxy.AnnotationPodRole, "y"), terminating)) })
	step("second pod", "shop/cart", true, func() { a.put(podOf("b", "cart", nil)) })
	step("ended", "shop/cart", true, func() { a.put(podOf("a", "cart", ip, terminating, ended)) })
	step("removed after that", "shop/cart", false, func() { a.delete(podOf("a", "cart", ip)) })
	step("account", "shop/cart", true, func() { a.put(account("cart", proxy.AnnotationRoleARN, roleARN, proxy.AnnotationExternalID, "xyz")) })
	step("account recreated with the same annotations", "shop/cart", true, func() {
		sa := account("cart", proxy.AnnotationRoleARN, roleARN, proxy.AnnotationExternalID, "xyz")
		sa.UID = "other"
		a.put(sa)
	})
	step("namespace", "shop/cart", true, func() { a.put(namespace("shop", proxy.AnnotationPermitted, ".*")) })
	step("last pod", "shop/cart", true, func() { a.delete(podOf("b", "cart", nil)) })
}

// Live are the keys of bound pods, before they have an IP and until their last pod ends.
func TestLive(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(account("irsa", proxy.AnnotationRoleARN, roleARN), account("eks", proxy.AnnotationRoleARN, roleARN), account("job", proxy.AnnotationRoleARN, roleARN),
		account("agent", proxy.AnnotationRoleARN, roleARN), account("mixed", proxy.AnnotationRoleARN, roleARN))
	a.put(
		podOf("pending", "cart", nil, phase(corev1.PodPending)), podOf("second", "cart", nil),
		podOf("irsa", "irsa", nil, env("AWS_WEB_IDENTITY_TOKEN_FILE")),
		podOf("eks", "eks", nil, func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{{Env: []corev1.EnvVar{{Name: "AWS_CONTAINER_CREDENTIALS_FULL_URI"}}}}
		}),
		podOf("m1", "mixed", nil, env("AWS_WEB_IDENTITY_TOKEN_FILE")), podOf("m2", "mixed", nil),
		podOf("job", "job", nil, phase(corev1.PodSucceeded)), podOf("agent", "agent", nil, hostNetwork),
		podOf("none", "none", nil), podOf("far", "far", nil, onNode("node-2")),
	)
	h := start(t, a, testPolicy()).synced(t)
	live := func() map[string]bool {
		m := map[string]bool{}
		for key, prefetch := range h.Live() {
			m[key.ServiceAccount] = m[key.ServiceAccount] || prefetch
		}
		return m
	}
	if d := cmp.Diff(map[string]bool{"cart": true, "irsa": false, "eks": false, "mixed": true}, live()); d != "" {
		t.Errorf("Live (-want +got):\n%s", d)
	}
	a.delete(podOf("second", "cart", nil), podOf("m2", "mixed", nil))
	h.flush()
	if d := cmp.Diff(map[string]bool{"cart": true, "irsa": false, "eks": false, "mixed": false}, live()); d != "" {
		t.Errorf("Live (-want +got):\n%s", d)
	}
	a.put(podOf("pending", "cart", nil, phase(corev1.PodFailed)))
	h.flush()
	if d := cmp.Diff(map[string]bool{"irsa": false, "eks": false, "mixed": false}, live()); d != "" {
		t.Errorf("Live (-want +got):\n%s", d)
	}
	for range h.Live() {
		break // must not panic
	}
}

// There is one watch per service account and namespace in use, none for what others use, and none too many afterwards.
func TestWatchesAreCounted(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	h := start(t, a, testPolicy()).synced(t)
	open := func(what string, accounts, namespaces int) {
		t.Helper()
		h.flush()
		h.until(fmt.Sprintf("%s: %d and %d watches", what, accounts, namespaces), func() bool {
			return a.open["pods"] == 1 && a.open["serviceaccounts"] == accounts && a.open["namespaces"] == namespaces
		})
	}
	open("empty", 0, 0)
	for i := range 50 {
		a.put(podOf(fmt.Sprint("far-", i), fmt.Sprint("far-", i), nil, onNode("node-2")))
	}
	open("foreign pods", 0, 0)
	for i := range 10 {
		a.put(podOf(fmt.Sprint("a-", i), "cart", nil))
	}
	open("ten pods of one account", 1, 1)
	a.put(podOf("b", "second", nil), podOf("host", "third", nil, hostNetwork), podOf("job", "fourth", nil, phase(corev1.PodSucceeded)))
	open("second account", 2, 1)
	for i := range 9 {
		a.delete(podOf(fmt.Sprint("a-", i), "cart", nil))
	}
	open("nine gone", 2, 1)
	a.put(podOf("a-9", "cart", nil, phase(corev1.PodSucceeded)))
	open("the tenth ended", 1, 1)
	a.delete(podOf("b", "second", nil))
	open("all gone", 0, 0)
	a.put(podOf("c", "cart", []string{"10.0.0.1"}))
	if c := mustWait(t, h.Pods, "10.0.0.1"); c.Grant == nil {
		t.Errorf("used again: %+v", c.Refusal)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	want := map[string]int{
		"watch pods spec.nodeName=" + nodeName: 1, "watch namespaces metadata.name=shop": 2,
		"watch serviceaccounts metadata.name=cart": 2, "watch serviceaccounts metadata.name=second": 1,
	}
	if d := cmp.Diff(want, a.opened); d != "" {
		t.Errorf("requests (-want +got):\n%s", d)
	}
}

// What is known stays known while the API server is away, and what happened meanwhile is known after it: from the stream,
// or from a new list when the stream's past is gone.
func TestReconnect(t *testing.T) {
	for name, expired := range map[string]bool{"resumed": false, "expired": true} {
		for mode, watchList := range map[string]bool{"watch-list": true, "list and watch": false} {
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				a := newAPIServer(t)
				a.watchList = watchList
				shop(a)
				a.put(account("other", proxy.AnnotationRoleARN, roleARN[:31]+"other"),
					podOf("a", "cart", []string{"10.0.0.1"}), podOf("b", "cart", []string{"10.0.0.2"}), podOf("c", "other", []string{"10.0.0.3"}))
				h := start(t, a, testPolicy()).synced(t)
				a.set(func() { a.down = true })
				a.disconnect()
				h.until("watches to end", func() bool { return a.open["pods"] == 0 })
				h.expect(t, map[string]string{"10.0.0.1": "a as cart", "10.0.0.2": "b as cart", "10.0.0.3": "c as other", "10.0.0.4": "unknown"})
				if !h.Synced() {
					t.Error("not synced any more")
				}
				a.delete(podOf("a", "cart", nil), account("other"))
				a.put(podOf("b", "cart", []string{"10.0.0.4"}), podOf("a", "cart", []string{"10.0.0.2"}, uid("new")))
				if expired {
					a.compact()
				}
				a.set(func() { a.down = false })
				c := mustWait(t, h.Pods, "10.0.0.4")
				h.until("the rest", func() bool {
					return find(h.Pods, "10.0.0.3") == "c refused(0)" && find(h.Pods, "10.0.0.2") == "a as cart"
				})
				h.expect(t, map[string]string{"10.0.0.1": "unknown"})
				if c.Pod.UID != "uid-b" {
					t.Errorf("caller %+v", c.Pod)
				}
				poll(t, "no failure is remembered", func() bool { return h.Err() == nil })
			})
		}
	}
}

// Without a permission nothing is guessed, and the log says which one is missing.
func TestForbidden(t *testing.T) {
	for resource, want := range map[string]string{"pods": "not synced", "serviceaccounts": "incomplete", "namespaces": "incomplete"} {
		t.Run(resource, func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			shop(a)
			a.put(podOf("a", "cart", []string{"10.0.0.1"}), podOf("b", "cart", []string{"10.0.0.2"}))
			a.forbidden["watch "+resource], a.forbidden["list "+resource] = true, true
			h := start(t, a, testPolicy())
			poll(t, "the refusal", func() bool { return h.Err() != nil && strings.Contains(h.Err().Error(), "list "+resource) })
			if resource != "pods" {
				h.flush()
			}
			h.expect(t, map[string]string{"10.0.0.1": want})
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			err := h.WaitSynced(ctx)
			if h.Synced() || !errors.Is(err, proxy.ErrNotSynced) || !strings.Contains(err.Error(), resource+" is missing, see the ClusterRole") {
				t.Errorf("WaitSynced = %v", err)
			}
			poll(t, "the log, which is written after Err knows", func() bool {
				return strings.Contains(h.log.String(), "verb=list resource="+resource)
			})
			if n := strings.Count(h.log.String(), "level=ERROR"); n > 2 {
				t.Errorf("%d errors logged for one missing permission", n)
			}
			if resource == "serviceaccounts" {
				a.put(podOf("c", "another", nil))
				poll(t, "the second failure", func() bool { return strings.Contains(h.Err().Error(), "another") })
				a.delete(podOf("c", "another", nil))
				poll(t, "it to be forgotten with its pod", func() bool { return !strings.Contains(h.Err().Error(), "another") })
			}
			a.set(func() { clear(a.forbidden) })
			h.synced(t).expect(t, map[string]string{"10.0.0.1": "a as cart"})
		})
	}
}

// Run leaves no goroutine, neither with watches open nor with an API server that refuses connections.
func TestRunEnds(t *testing.T) {
	a := newAPIServer(t)
	shop(a)
	for i := range 20 {
		a.put(podOf(fmt.Sprint("p", i), fmt.Sprint("sa", i), nil))
	}
	h := start(t, a, testPolicy()).synced(t)
	h.stop()
	a.wait("watches to be closed", func() bool { return a.open["pods"]+a.open["serviceaccounts"]+a.open["namespaces"] == 0 })
	noGoroutines(t)
	if err := h.Run(t.Context()); err == nil {
		t.Error("Run can be called twice")
	}

	gone := newAPIServer(t)
	gone.Close()
	h = newHarness(t, gone, testPolicy())
	h.backoff = &wait.Backoff{Duration: time.Minute, Steps: 1}
	h.run(t)
	poll(t, "a failure", func() bool { return h.Err() != nil })
	begin := time.Now()
	h.stop()
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("Run took %s to end", d)
	}
	noGoroutines(t)
}

// After an outage the API server is asked again when a request needs it, and not when the pause is over.
func TestRequestEndsThePause(t *testing.T) {
	for name, tt := range map[string]struct {
		synced  bool
		refused int // requests until the long pause
	}{
		"down from the start": {refused: 4}, // twice a watch-list and a list
		"down later":          {synced: true, refused: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPIServer(t)
			shop(a)
			a.put(podOf("a", "cart", []string{"10.0.0.1"}))
			a.down = !tt.synced
			h := newHarness(t, a, testPolicy())
			h.backoff = &wait.Backoff{Duration: 10 * time.Millisecond, Factor: 1e6, Steps: 1000} // then 3 h
			h.run(t)
			if tt.synced {
				h.synced(t)
				a.set(func() { a.down = true })
				a.disconnect()
			}
			a.wait("the outage", func() bool { return a.refused["pods"] >= tt.refused })
			poll(t, "the log", func() bool { return h.Err() != nil })
			a.put(podOf("b", "cart", []string{"10.0.0.2"}))
			a.set(func() { a.down = false })
			if c := mustWait(t, h.Pods, "10.0.0.2"); c.Pod.Name != "b" {
				t.Errorf("found %+v", c)
			}
		})
	}
}

// An attempt under way is not ended: an API server that needs long to answer would never be heard.
func TestRequestsEndNoAttempt(t *testing.T) {
	a := newAPIServer(t)
	shop(a)
	a.put(podOf("a", "cart", []string{"10.0.0.1"}))
	a.down = true
	h := newHarness(t, a, testPolicy())
	h.hurries = rate.NewLimiter(rate.Inf, 0)
	h.run(t)
	poll(t, "the outage", func() bool { return h.Err() != nil })
	a.set(func() { a.held["pods"], a.down = true, false })
	a.wait("an attempt", func() bool { return a.holding == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for begin := time.Now(); time.Since(begin) < 300*time.Millisecond; {
		_, _ = h.Wait(ctx, addr("10.0.0.1"))
	}
	a.mu.Lock()
	abandoned := a.abandoned
	a.mu.Unlock()
	if abandoned > 0 {
		t.Errorf("%d attempts were given up", abandoned)
	}
	a.set(func() { a.held["pods"] = false })
	h.synced(t)
}

// But not more often than hurryEvery, whoever asks.
func TestRequestsDoNotFlood(t *testing.T) {
	a := newAPIServer(t)
	a.down = true
	h := newHarness(t, a, testPolicy())
	h.backoff = &wait.Backoff{Duration: time.Hour, Factor: 1, Steps: 1000}
	h.run(t)
	poll(t, "the outage", func() bool { return h.Err() != nil })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for begin := time.Now(); time.Since(begin) < hurryEvery/10; {
		_, _ = h.Wait(ctx, addr("10.0.0.1"))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := a.refused["pods"]; n > 2*2 { // a watch-list and a list, for each of two attempts
		t.Errorf("%d requests", n)
	}
}

// noGoroutines gives a cancelled list request of client-go, which nobody can wait for, the time to notice.
func noGoroutines(t *testing.T) {
	t.Helper()
	stacks := ours()
	for end := time.Now().Add(5 * time.Second); stacks != "" && time.Now().Before(end); stacks = ours() {
		time.Sleep(time.Millisecond)
	}
	if stacks != "" {
		t.Errorf("goroutines after Run:\n%s", stacks)
	}
}

// ours returns the stacks of goroutines in this package or client-go, but tests.
func ours() string {
	buf := make([]byte, 1<<20)
	var found []string
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "_test.go") || strings.Contains(g, "testing.") {
			continue
		}
		if strings.Contains(g, "imdsgate/proxy/pods.") || strings.Contains(g, "client-go/tools") {
			found = append(found, g)
		}
	}
	return strings.Join(found, "\n\n")
}

// Find does not allocate, whatever happens to the pods meanwhile, and is right at every moment.
func TestFindWhileThingsChange(t *testing.T) {
	h := newHarness(t, newAPIServer(t), testPolicy())
	feed := fill(h.Pods, 64)
	ip, unknown := addr("10.0.1.1"), addr("::ffff:10.9.9.9")
	var done sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 2 {
		done.Go(func() {
			for ctx.Err() == nil {
				if c, err := h.Find(ip); err != nil || c.Pod.Name != "pod-1" {
					t.Errorf("Find = %+v, %v", c, err)
					return
				}
				for range h.Live() {
					break
				}
				h.All()
			}
		})
	}
	for i := range 300 {
		feed(2 + i%60)
	}
	cancel()
	done.Wait()
	if n := testing.AllocsPerRun(1000, func() { _, _ = h.Find(ip) }); n != 0 {
		t.Errorf("Find allocates %v times", n)
	}
	if n := testing.AllocsPerRun(1000, func() { _, _ = h.Find(unknown) }); n != 0 {
		t.Errorf("Find of an unknown IP allocates %v times", n)
	}
}

// fill makes n pods known without an API server. The returned function toggles one pod's IP away and back.
func fill(p *Pods, n int) func(i int) {
	p.spawn = func(func(context.Context)) context.CancelFunc { return func() {} }
	pod := func(i int, away bool) facts {
		f := podOf(fmt.Sprint("pod-", i), fmt.Sprint("sa-", i%20), []string{fmt.Sprintf("10.0.%d.1", i), fmt.Sprintf("fd00::%x", i)})
		if away {
			f.Status.PodIP, f.Status.PodIPs = "", nil
		}
		return podFacts(f)
	}
	now := time.Now()
	list := make([]facts, 0, n)
	for i := range n {
		list = append(list, pod(i, false))
	}
	p.update(func(c *change) { p.replace(c, list, now) })
	for _, u := range p.namespaces {
		p.update(func(c *change) { p.seen(c, u, namespaceFacts(namespace("shop"))) })
	}
	for name, u := range p.accounts {
		p.update(func(c *change) { p.seen(c, u, accountFacts(account(name.Name, proxy.AnnotationRoleARN, roleARN))) })
	}
	away := map[int]bool{}
	return func(i int) {
		away[i] = !away[i]
		p.update(func(c *change) { p.upsert(c, pod(i, away[i]), now, time.Time{}) })
	}
}

func BenchmarkFind(b *testing.B) {
	p, err := New(Options{
		Config: &rest.Config{Host: "http://127.0.0.1:1"}, Node: nodeName, Policy: testPolicy(), Metrics: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	fill(p, 250)
	ip := addr("10.0.77.1")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := p.Find(ip); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkUpdate(b *testing.B) {
	p, err := New(Options{
		Config: &rest.Config{Host: "http://127.0.0.1:1"}, Node: nodeName, Policy: testPolicy(), Metrics: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	toggle := fill(p, 250)
	b.ReportAllocs()
	for b.Loop() {
		toggle(7)
	}
}

// Token is bound to a pod of the service account that is alive, and to another one if that has just gone.
func TestToken(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(account("long", proxy.AnnotationTokenExpiration, "7200"), podOf("l", "long", nil),
		podOf("a", "cart", nil, terminating), podOf("b", "cart", nil), podOf("c", "cart", nil), podOf("d", "cart", nil, phase(corev1.PodSucceeded)))
	h := start(t, a, testPolicy()).synced(t)
	gone := map[string]error{}
	a.set(func() {
		a.tokenFor = func(s authenticationv1.TokenRequestSpec) (string, error) {
			return "token of " + s.BoundObjectRef.Name, gone[s.BoundObjectRef.Name]
		}
	})
	pods := schema.GroupResource{Resource: "pods"}
	for _, tt := range []struct {
		name, account string
		gone          map[string]error
		want, err     string
	}{
		{name: "first", account: "cart", want: "token of b"},
		{name: "404, then the next", account: "cart", gone: map[string]error{"b": apierrors.NewNotFound(pods, "b")}, want: "token of c"},
		{name: "409 too, then the one that is going", account: "cart", gone: map[string]error{
			"b": apierrors.NewConflict(pods, "b", errors.New("UID")), "c": apierrors.NewNotFound(pods, "c"),
		}, want: "token of a"},
		{name: "forbidden", account: "cart", gone: map[string]error{"b": apierrors.NewForbidden(pods, "b", errors.New("no"))},
			err: "the permission to create serviceaccounts/token is missing"},
		{name: "all gone", account: "long", gone: map[string]error{"l": apierrors.NewNotFound(pods, "l")}, err: "not found"},
		{name: "no pod", account: "unused", err: "no pod of this node uses it"},
		{name: "own life", account: "long", want: "token of l"},
	} {
		a.set(func() { gone, a.tokens = tt.gone, nil })
		got, err := h.Token(t.Context(), "shop", tt.account, "sts.amazonaws.com")
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %q, %v", tt.name, got, err)
		}
	}
	seconds := int64(7200)
	want := []authenticationv1.TokenRequestSpec{{
		Audiences: []string{"sts.amazonaws.com"}, ExpirationSeconds: &seconds,
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: "l", UID: "uid-l"},
	}}
	if d := cmp.Diff(want, a.tokens); d != "" {
		t.Errorf("request (-want +got):\n%s", d)
	}
	for in, want := range map[string]int64{"": 600, "600": 600, "1": 600, "-5": 600, "x": 600, "86400": 86400, "999999": 86400, "9e9": 600} {
		if got := tokenSeconds(in); got != want {
			t.Errorf("tokenSeconds(%q) = %d, want %d", in, got, want)
		}
	}
}

// Events reach the object they are about, and no flood of them the API server.
func TestEvents(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	shop(a)
	a.put(podOf("a", "cart", nil, annotated(proxy.AnnotationPodRole, "another")))
	h := start(t, a, testPolicy()).synced(t)
	h.until("the conflict", func() bool { return len(a.events) == 1 })
	pod := proxy.Pod{UID: "uid-a", Namespace: "shop", Name: "a", ServiceAccount: "cart"}
	for range 5000 {
		h.Report(pod, true, proxy.EventInvalidRoleARN, "arn:oops is no role "+strings.Repeat("x", 5000))
	}
	h.until("the second", func() bool { return len(a.events) == 2 })
	h.Report(pod, false, proxy.EventRoleDenied, "last")
	h.until("the third", func() bool { return len(a.events) == 3 })

	type brief struct{ Kind, Namespace, Name, UID, Reason, Type, Component, Host string }
	var got []brief
	for _, e := range a.events {
		o := e.InvolvedObject
		got = append(got, brief{o.Kind, o.Namespace, o.Name, string(o.UID), e.Reason, e.Type, e.Source.Component, e.Source.Host})
		if len(e.Message) > 1024 || e.Message == "" || e.Count != 1 || e.Namespace != "shop" {
			t.Errorf("event %+v", e)
		}
	}
	want := []brief{
		{"Pod", "shop", "a", "uid-a", "RoleConflict", "Warning", "imdsgate", nodeName},
		{"ServiceAccount", "shop", "cart", "sa-cart", "InvalidRoleARN", "Warning", "imdsgate", nodeName},
		{"Pod", "shop", "a", "uid-a", "RoleDenied", "Warning", "imdsgate", nodeName},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
}

// The same report again is counted on the Event that is there, then left out; an Event that has expired is made anew.
func TestEventsAggregate(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	h := start(t, a, testPolicy()).synced(t)
	queue := func(pod, text string) {
		h.Pods.events.queue <- report{ // past the interval between reports
			pod: proxy.Pod{UID: pod, Namespace: "shop", Name: pod}, reason: proxy.EventRoleDenied, text: text,
		}
	}
	queue("a", "first")
	queue("a", "second")
	h.until("the second", func() bool { return len(a.writes) == 2 })
	if e := a.events[0]; e.Count != 2 || e.Message != "second" || !e.LastTimestamp.After(e.FirstTimestamp.Add(-time.Second)) {
		t.Errorf("event %+v", e)
	}
	a.set(func() { a.events = nil })
	for range 50 {
		queue("a", "more")
	}
	queue("b", "other")
	h.until("the last", func() bool { return len(a.events) == 2 })
	want := []string{"create", "patch", "patch", "create", "patch", "patch", "create"}
	if d := cmp.Diff(want, a.writes); d != "" {
		t.Errorf("writes (-want +got):\n%s", d)
	}
	if e := a.events[0]; e.Count != 5 || e.InvolvedObject.Name != "a" {
		t.Errorf("event %+v", e)
	}
	a.set(func() { a.forbidden["create events"] = true })
	queue("c", "forbidden")
	poll(t, "the log", func() bool {
		return strings.Contains(h.log.String(), "the permission to create events is missing")
	})
}

func TestEventSeriesAreBounded(t *testing.T) {
	e := newEvents(nil, nodeName, nil, nil)
	known := map[seriesKey]*series{}
	for i := range eventSeries + 200 {
		e.series(known, e.event(report{pod: proxy.Pod{UID: fmt.Sprint(i)}}))
		if len(known) > eventSeries {
			t.Fatalf("%d series", len(known))
		}
	}
	for _, s := range known {
		s.last = s.last.Add(-eventTTL - time.Second)
	}
	e.series(known, e.event(report{pod: proxy.Pod{UID: "new"}}))
	if len(known) != 1 {
		t.Errorf("%d series are left after an hour", len(known))
	}
}

func TestEventName(t *testing.T) {
	now := time.Unix(0, 0x1234567890abcdef)
	for in, want := range map[string]string{
		"cart-0": "cart-0.1234567890abcdef",
		strings.Repeat("a", 235) + "-" + "bcdefg": strings.Repeat("a", 235) + ".1234567890abcdef",
	} {
		if got := eventName(in, now); got != want || len(got) > 253 {
			t.Errorf("eventName(%s) = %s", in, got)
		}
	}
}

func TestEventsDue(t *testing.T) {
	e := newEvents(nil, nodeName, nil, nil)
	now := time.Now()
	r := report{pod: proxy.Pod{UID: "1"}, reason: "A"}
	other := report{pod: proxy.Pod{UID: "1"}, reason: "B"}
	if !e.due(r, now) || e.due(r, now.Add(eventInterval-1)) || !e.due(other, now) || !e.due(r, now.Add(eventInterval)) {
		t.Error("one report per reason and interval")
	}
	for i := range 100 * eventQueue {
		e.due(report{pod: proxy.Pod{UID: fmt.Sprint(i)}}, now.Add(time.Duration(i)*eventInterval))
	}
	if len(e.recent) > eventQueue {
		t.Errorf("%d remembered", len(e.recent))
	}
}

func TestNodeExists(t *testing.T) {
	t.Parallel()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}
	for _, tt := range []struct {
		name      string
		objects   []apiObject
		forbidden []string
		want      string
	}{
		{name: "a pod is there", objects: []apiObject{podOf("self", "x", nil)}, forbidden: []string{"get nodes"}},
		{name: "the node is there", objects: []apiObject{node}},
		{name: "unknown", objects: []apiObject{podOf("far", "x", nil, onNode("node-2"))}, want: "node node-1 does not exist: set -node or NODE_NAME"},
		{name: "unknown, no right to ask", forbidden: []string{"get nodes"}, want: "no pod is bound to node node-1, not even this one: set -node or NODE_NAME"},
		{name: "no right at all", forbidden: []string{"list pods"}, want: "the permission to list pods is missing"},
	} {
		a := newAPIServer(t)
		a.put(tt.objects...)
		for _, f := range tt.forbidden {
			a.forbidden[f] = true
		}
		err := newHarness(t, a, testPolicy()).NodeExists(t.Context())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}

	// Where the pods are known none is sent again, but the right to list them is needed all the same.
	a := newAPIServer(t)
	a.put(podOf("self", "x", nil))
	h := start(t, a, testPolicy()).synced(t)
	if err := h.NodeExists(t.Context()); err != nil {
		t.Errorf("with a pod: %v", err)
	}
	a.set(func() {
		if a.opened["list pods spec.nodeName="+nodeName+",metadata.name=-"] != 1 {
			t.Errorf("lists: %v, want one of no pod", a.opened)
		}
		a.forbidden["list pods"] = true
	})
	if err := h.NodeExists(t.Context()); err == nil || !strings.Contains(err.Error(), "the permission to list pods is missing") {
		t.Errorf("without the right to list: %v", err)
	}
}

// Explain names every step, and no secret.
func TestExplain(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(namespace("shop"), account("cart", proxy.AnnotationRoleARN, roleARN, proxy.AnnotationExternalID, "hush-hush"),
		podOf("a", "cart", []string{"10.0.0.1"}), podOf("b", "none", []string{"10.0.0.2"}, terminating), podOf("host", "cart", nil, hostNetwork),
		podOf("irsa", "cart", nil, env("AWS_WEB_IDENTITY_TOKEN_FILE")), podOf("job", "cart", []string{"10.0.0.1"}, phase(corev1.PodSucceeded)),
		podOf("next", "cart", []string{"10.0.0.2"}))
	h := start(t, a, testPolicy()).synced(t)
	decisions := map[string]string{}
	for _, e := range h.All() {
		decisions[e.Name] = e.Decision
		text := fmt.Sprint(e.Steps)
		if strings.Contains(text, "hush") || len(e.Steps) < 2 {
			t.Errorf("%s: %s", e.Name, text)
		}
		for name, want := range map[string]string{
			"a": "requests from 10.0.0.1 are its own", "b": "requests from 10.0.0.2 are another pod's", "host": "hostNetwork",
			"irsa": "another source", "job": "have ended",
		} {
			if e.Name == name && !strings.Contains(text, want) {
				t.Errorf("%s: %s", name, text)
			}
		}
	}
	want := map[string]string{"a": "granted", "b": "refused", "host": "none", "irsa": "granted", "job": "none", "next": "granted"}
	if d := cmp.Diff(want, decisions); d != "" {
		t.Errorf("decisions (-want +got):\n%s", d)
	}
	e, ok := h.Explain("shop", "a")
	if !ok || e.RoleARN != roleARN || e.SessionName == "" || !e.Prefetch || len(e.IPs) != 1 {
		t.Errorf("Explain = %+v, %v", e, ok)
	}
	if _, ok := h.Explain("shop", "zzz"); ok {
		t.Error("explains a pod that is not there")
	}
}

// Whoever answers by IP is told of each change of what Find says, when Find says it.
func TestOnMove(t *testing.T) {
	a := newAPIServer(t)
	shop(a)
	a.put(podOf("a", "cart", []string{"10.0.0.1"}))
	h := newHarness(t, a, testPolicy())
	var mu sync.Mutex
	var moves []string
	h.onMove = func(ip netip.Addr, uid string) {
		if c, err := h.Find(ip); err == nil && c.Pod.UID != uid {
			t.Errorf("%s is %s's, told %s", ip, c.Pod.UID, uid)
		}
		mu.Lock()
		defer mu.Unlock()
		if uid = ip.String() + " " + uid; len(moves) == 0 || moves[len(moves)-1] != uid {
			moves = append(moves, uid)
		}
	}
	h.run(t)
	mustWait(t, h.Pods, "10.0.0.1")
	a.delete(podOf("a", "cart", nil))
	a.put(podOf("b", "cart", []string{"10.0.0.1"}))
	want := []string{"10.0.0.1 ", "10.0.0.1 uid-a", "10.0.0.1 ", "10.0.0.1 uid-b"} // first it is not decided
	poll(t, "the moves", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return slices.Equal(moves, want)
	})
}
