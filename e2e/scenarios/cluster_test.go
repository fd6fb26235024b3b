package scenarios

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/clustertest"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// scenario is one test's view of the cluster.
type scenario struct {
	*testing.T
	*lab
	ctx      context.Context
	start    time.Time
	expected imds.Expected // of the nodes, at the real endpoint
	mark     clustertest.Mark
}

// beginScenario starts a scenario, which may take so long. At its end the real metadata endpoint is asked who reached it.
func beginScenario(t *testing.T, limit time.Duration) *scenario {
	t.Helper()
	// Not the test's: that one ends before what is to be cleaned up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), limit)
	t.Cleanup(cancel)
	s := &scenario{T: t, lab: shared, ctx: ctx, start: time.Now(), expected: imds.Expected{NodeRole: true}}
	s.breach()
	t.Cleanup(s.sealed)
	return s
}

func (s *scenario) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// figures prints the scenario's line for the documentation.
func (s *scenario) figures(format string, args ...any) {
	fmt.Printf("FIGURES %s (%.0f s): %s\n", s.Name(), time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

// breach forgets what has reached the endpoint up to now: the scenario has opened it.
func (s *scenario) breach() {
	s.Helper()
	var err error
	s.mark, err = clustertest.NewMark(s.ctx, s.fabric)
	s.must(err)
}

// reached is what has reached the endpoint since the beginning and should not have.
func (s *scenario) reached() []string {
	s.Helper()
	found, err := s.mark.Reached(s.ctx, s.expected)
	s.must(err)
	return found
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

func (s *scenario) sealed() {
	s.Helper()
	if found := s.reached(); len(found) > 0 {
		s.Errorf("the node's real metadata endpoint was reached: %d times, such as %s", len(found), found[0])
	}
}

// --- nodes

func (s *scenario) onNode(node int, args ...string) string {
	s.Helper()
	out, err := cluster(s.ctx, nil, append([]string{"in", nodeName(node)}, args...)...)
	s.must(err)
	return out
}

func nodeName(i int) string { return "node" + strconv.Itoa(i) }

// rules are those of a node's iptables and its routing, without counters and what changes by itself.
func rules(ctx context.Context, node int) (string, error) {
	var all strings.Builder
	for _, show := range []string{"iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save", "ip -4 -d rule", "ip -6 -d rule"} {
		out, err := cluster(ctx, nil, "in", nodeName(node), "sh", "-c", show)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&all, "== %s\n", show)
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "#") {
				all.WriteString(counters.ReplaceAllString(line, ""))
			}
		}
	}
	return all.String(), nil
}

var counters = regexp.MustCompile(` ?\[\d+:\d+\]`)

// daemon is the process of the one instance on a node.
func (s *scenario) daemon(node int) int {
	s.Helper()
	for {
		out := s.onNode(node, "sh", "-c", "pgrep -xa imdsgate || true")
		var pids []int
		for line := range strings.Lines(out) {
			pid, args, _ := strings.Cut(strings.TrimSpace(line), " ")
			if n, err := strconv.Atoi(pid); err == nil && !strings.Contains(args, "-probe") {
				pids = append(pids, n)
			}
		}
		if len(pids) == 1 {
			return pids[0]
		}
		select {
		case <-s.ctx.Done():
			s.Fatalf("node %d runs %d daemons", node, len(pids))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// --- release

// base are the values that the cluster needs; everything else is the chart's default.
func (l *lab) base() []string {
	return []string{"-f", "../cluster/values.yaml", "--set", "podAnnotations.image=" + l.daemonImage}
}

func (s *scenario) helm(args ...string) string {
	s.Helper()
	home := s.TempDir()
	env := []string{"HELM_CACHE_HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_DATA_HOME=" + home, "KUBECONFIG=" + s.dir + "/kubeconfig"}
	out, err := command(s.ctx, env, filepath.Join(s.bin, "helm"), append([]string{"-n", namespace}, args...)...)
	s.must(err)
	return out
}

// install brings the release to the chart's defaults and these values, and waits until every node is served.
func (s *scenario) install(set ...string) string {
	s.Helper()
	notes := s.upgrade(set...)
	s.rolledOut()
	return notes
}

// upgrade is install without waiting.
func (s *scenario) upgrade(set ...string) string {
	s.Helper()
	args := append([]string{"upgrade", "--install", release, chart, "--reset-values"}, s.base()...)
	for _, v := range set {
		args = append(args, "--set-json", v)
	}
	return s.helm(args...)
}

func (s *scenario) rolledOut() {
	s.Helper()
	if _, err := s.tryKubectl("-n", namespace, "rollout", "status", "daemonset/"+release, "--timeout=60s"); err != nil {
		logs, _ := s.tryKubectl("-n", namespace, "logs", "-l", "app.kubernetes.io/name="+release, "--tail=20", "--prefix")
		s.Fatalf("%v\n%s\n%s", err, s.kubectl("-n", namespace, "get", "pods", "-o", "wide"), logs)
	}
}

func (s *scenario) kubectl(args ...string) string {
	s.Helper()
	out, err := s.tryKubectl(args...)
	s.must(err)
	return out
}

func (s *scenario) tryKubectl(args ...string) (string, error) {
	return command(s.ctx, nil, filepath.Join(s.bin, "kubectl"), append([]string{"--kubeconfig", s.dir + "/kubeconfig"}, args...)...)
}

// --- objects

// newNamespace makes one for the scenario. It goes with it.
func (s *scenario) newNamespace(name string, annotations map[string]string) {
	s.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}
	_, err := s.kube.CoreV1().Namespaces().Create(s.ctx, ns, metav1.CreateOptions{})
	s.must(err)
	s.Cleanup(func() {
		background := metav1.DeletePropagationBackground
		if err := s.kube.CoreV1().Namespaces().Delete(context.WithoutCancel(s.ctx), name, metav1.DeleteOptions{PropagationPolicy: &background}); err != nil {
			s.Error(err)
		}
	})
}

func (s *scenario) serviceAccount(ns, name, role string) {
	s.Helper()
	sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns, Annotations: roleOf(role)}}
	_, err := s.kube.CoreV1().ServiceAccounts(ns).Create(s.ctx, sa, metav1.CreateOptions{})
	s.must(err)
}

func (s *scenario) annotate(ns, serviceAccount, role string) {
	s.Helper()
	value := "null"
	if role != "" {
		value = strconv.Quote(role)
	}
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%s}}}`, roleAnnotation, value)
	_, err := s.kube.CoreV1().ServiceAccounts(ns).Patch(s.ctx, serviceAccount, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	s.must(err)
}

const roleAnnotation = "eks.amazonaws.com/role-arn"

func roleOf(arn string) map[string]string {
	if arn == "" {
		return nil
	}
	return map[string]string{roleAnnotation: arn}
}

func allowed(arns ...string) map[string]string {
	b, _ := json.Marshal(arns)
	return map[string]string{"iam.amazonaws.com/allowed-roles": string(b)}
}

// role makes an IAM role that may list buckets and groups.
func (s *scenario) role(name string) string {
	s.Helper()
	arn, err := s.fabric.Role(s.ctx, name, aws.ActionListBuckets, aws.ActionListGroups)
	s.must(err)
	return arn
}

// podSpec is what differs between the scenarios' pods.
type podSpec struct {
	namespace, name, account string
	node                     int // 0: the scheduler's choice
	image                    string
	args                     []string
	restart                  corev1.RestartPolicy
	hostNetwork              bool
	labels                   map[string]string
	edit                     func(*corev1.Pod) // what else differs; may be nil
}

func (p podSpec) object() *corev1.Pod {
	one := int64(1)
	no := false
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.name, Namespace: p.namespace, Labels: p.labels},
		Spec: corev1.PodSpec{
			ServiceAccountName: p.account, RestartPolicy: p.restart, TerminationGracePeriodSeconds: &one,
			AutomountServiceAccountToken: &no, HostNetwork: p.hostNetwork,
			Containers: []corev1.Container{{Name: "main", Image: "test.local/probe:1", ImagePullPolicy: corev1.PullNever, Args: p.args}},
		},
	}
	if p.restart == "" {
		o.Spec.RestartPolicy = corev1.RestartPolicyNever
	}
	if p.image != "" {
		o.Spec.Containers[0].Image, o.Spec.Containers[0].Command, o.Spec.Containers[0].Args = p.image, p.args, nil
	}
	if p.node != 0 {
		o.Spec.NodeSelector = map[string]string{corev1.LabelHostname: nodeName(p.node)}
	}
	if p.edit != nil {
		p.edit(o)
	}
	return o
}

func (s *scenario) create(p podSpec) {
	s.Helper()
	_, err := s.kube.CoreV1().Pods(p.namespace).Create(s.ctx, p.object(), metav1.CreateOptions{})
	s.must(err)
}

// waitPod waits until a pod is as it should be.
func (s *scenario) waitPod(ns, name string, is func(*corev1.Pod) bool) *corev1.Pod {
	s.Helper()
	pod, err := s.awaitPod(s.ctx, ns, "metadata.name="+name, is)
	if err != nil {
		s.Fatalf("pod %s/%s: %v\n%s", ns, name, err, describe(pod))
	}
	return pod
}

// awaitPod returns the last pod of the selection that was seen when it is as it should be.
func (l *lab) awaitPod(ctx context.Context, ns, fields string, is func(*corev1.Pod) bool) (last *corev1.Pod, err error) {
	for {
		w, err := l.kube.CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{FieldSelector: fields})
		if err != nil {
			return last, err
		}
		for e := range w.ResultChan() {
			if pod, ok := e.Object.(*corev1.Pod); ok && e.Type != watch.Deleted {
				if last = pod; is(pod) {
					w.Stop()
					return pod, nil
				}
			}
		}
		w.Stop()
		if ctx.Err() != nil {
			return last, ctx.Err()
		}
	}
}

func describe(p *corev1.Pod) string {
	if p == nil {
		return "never seen"
	}
	b, _ := json.Marshal(p.Status)
	return string(b)
}

func running(p *corev1.Pod) bool {
	return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Running != nil && p.Status.PodIP != ""
}

func ended(p *corev1.Pod) bool {
	return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Terminated != nil
}

// answer is what the program of a pod that ran `probe once` found.
func answer(p *corev1.Pod) (r sequence.Result, err error) {
	t := p.Status.ContainerStatuses[0].State.Terminated
	if t.ExitCode != 0 {
		return r, fmt.Errorf("the probe ended with %d: %s", t.ExitCode, t.Message)
	}
	err = json.Unmarshal([]byte(t.Message), &r)
	return r, err
}

// once runs a pod that asks once.
func (s *scenario) once(p podSpec) sequence.Result {
	s.Helper()
	p.args = []string{"once"}
	s.create(p)
	r, err := answer(s.waitPod(p.namespace, p.name, ended))
	s.must(err)
	return r
}

// ask asks once from a running pod.
func (s *scenario) ask(ns, pod string) sequence.Result {
	s.Helper()
	var r sequence.Result
	s.must(json.Unmarshal([]byte(s.kubectl("-n", ns, "exec", pod, "--", "/probe", "once")), &r))
	return r
}

// askUntil asks from a running pod until the answer is right, and returns how long that took.
func (s *scenario) askUntil(ns, pod, what string, right func(sequence.Result) bool) time.Duration {
	s.Helper()
	start := time.Now()
	for {
		r := s.ask(ns, pod)
		if right(r) {
			return time.Since(start)
		}
		select {
		case <-s.ctx.Done():
			s.Fatalf("%s: not in time; the last answer is %+v", what, r)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// holds fails unless the credentials are those of the role.
func (s *scenario) holds(r sequence.Result, role string) {
	s.Helper()
	if r.Kind != sequence.OK {
		s.Errorf("no credentials of %s: %s", role, r.Brief())
		return
	}
	if got := s.owner(r.AccessKeyID); got.RoleARN != role || got.NodeIndex != 0 {
		s.Errorf("WRONG CREDENTIALS: of %s (node %d) instead of %s", got.RoleARN, got.NodeIndex, role)
	}
}

func (s *scenario) owner(key string) control.Owner {
	s.Helper()
	o, err := s.fabric.Owner(s.ctx, key)
	s.must(err)
	return o
}

// --- load

// load is a program in a pod that asks until it is stopped.
type load struct {
	s    *scenario
	role string
	pod  string
	cmd  *exec.Cmd
	stop func() error
	out  bytes.Buffer
	errs bytes.Buffer
}

func (s *scenario) load(ns, pod, role string, workers int, interval time.Duration) *load {
	s.Helper()
	l := &load{s: s, role: role, pod: pod}
	l.cmd = exec.CommandContext(s.ctx, filepath.Join(s.bin, "kubectl"), "--kubeconfig", s.dir+"/kubeconfig",
		"-n", ns, "exec", "-i", pod, "--", "/probe", "load", strconv.Itoa(workers), interval.String())
	in, err := l.cmd.StdinPipe()
	s.must(err)
	l.stop = in.Close
	l.cmd.Stdout, l.cmd.Stderr = &l.out, &l.errs
	s.must(l.cmd.Start())
	return l
}

// end stops the load and fails on credentials that are not of the pod's role.
func (l *load) end() sequence.Summary {
	l.s.Helper()
	l.s.must(l.stop())
	if err := l.cmd.Wait(); err != nil {
		l.s.Fatalf("load in %s: %v: %s", l.pod, err, l.errs.String())
	}
	var sum sequence.Summary
	l.s.must(json.Unmarshal(l.out.Bytes(), &sum))
	for key, n := range sum.Keys {
		if o := l.s.owner(key); o.RoleARN != l.role || o.NodeIndex != 0 {
			l.s.Errorf("WRONG CREDENTIALS: %d times those of %s (node %d) in %s instead of %s", n, o.RoleARN, o.NodeIndex, l.pod, l.role)
		}
	}
	return sum
}
