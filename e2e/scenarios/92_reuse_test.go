package scenarios

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/scenarios/first"
)

const (
	reusePods   = 200 // half as many where the source is off; REUSE_PODS is another number
	reuseActive = 70  // at once, for 14 addresses: the kubelet tries again until one is free
	reuseDir    = "/run/imdsgate-reuse"
)

// reuseAddresses are what is left of node 1's for a while.
var reuseAddresses = netip.MustParsePrefix("10.244.1.16/28")

// Pods of two service accounts in turn pass through a /28 of addresses, more of them at a time than there are addresses. Each asks as
// its first instruction, then tries the session token and the open connection of the address's last holder. None ever gets
// what is not its own, and none is refused what is. Without the CNI results that cannot be promised: it is measured. TestLabReuse
// has a thousand pods and a harder timing, without kubelets.
func TestScenarioReuse(t *testing.T) {
	pods := reusePods
	if text := os.Getenv("REUSE_PODS"); text != "" {
		var err error
		if pods, err = strconv.Atoi(text); err != nil || pods < 2*reuseActive {
			t.Fatalf("REUSE_PODS=%s: %v; at least %d", text, err, 2*reuseActive)
		}
	}
	limit := 3*time.Minute + time.Duration(pods)*time.Second
	t.Run("CNI results", func(t *testing.T) {
		s := beginScenario(t, limit)
		s.install()
		u := s.reuse("reuse", first.CNI, pods)
		if u.Pods != pods {
			t.Errorf("%d of %d pods left a result", u.Pods, pods)
		}
		if err := u.Check(); err != nil {
			t.Error(err)
		}
	})
	t.Run("API server alone", func(t *testing.T) {
		s := beginScenario(t, limit)
		s.install(`flags.cni-results=""`)
		s.reuse("reuse-informer", first.Informer, pods/2)
	})
}

func (s *scenario) reuse(ns, source string, pods int) first.Reuse {
	s.Helper()
	roles := []string{s.role(ns + "/red"), s.role(ns + "/green")}
	s.newNamespace(ns, allowed(roles...))
	for i, role := range roles {
		s.serviceAccount(ns, fmt.Sprint("app", i), role)
	}
	s.confine(ns+"-confine", 1, reuseAddresses)
	s.onNode(1, "sh", "-c", "rm -rf "+reuseDir+" && mkdir "+reuseDir)
	s.Cleanup(func() { s.onNode(1, "rm", "-rf", reuseDir) })

	s.parade(ns, pods)
	// The last holder of each address has left a connection behind that it never ended. The node would send whoever has the address and
	// the port next to the daemon that it leads to, until a few seconds after that one's end.
	s.onNode(1, "conntrack", "-D", "-p", "tcp", "-s", reuseAddresses.String(), "-d", imds.IPv4.String())

	u := first.Reuse{Source: source, By: first.Kubelet, Addresses: 14}
	owners := map[string]string{}
	results := strings.NewReader(s.onNode(1, "sh", "-c", "cat "+reuseDir+"/*.result"))
	s.must(u.Count(results, reuseAddresses, func(pod, key string) (bool, error) {
		var n int
		if _, err := fmt.Sscanf(pod, "p%d", &n); err != nil {
			return false, err
		}
		if owners[key] == "" {
			owners[key] = s.owner(key).RoleARN
		}
		return owners[key] == roles[n%2], nil
	}))
	for _, line := range u.Lines() {
		s.figures("%s", line)
	}
	s.report(func(r *first.Report) { r.SetReuse(u) })
	return u
}

// parade runs pods until all of them have ended. Every other pair ends by itself, the others are deleted once they run.
func (s *scenario) parade(ns string, pods int) {
	s.Helper()
	w, err := s.kube.CoreV1().Pods(ns).Watch(s.ctx, metav1.ListOptions{})
	s.must(err)
	defer w.Stop()
	next := 0
	create := func() {
		if next == pods {
			return
		}
		mode := "exit"
		if next/2%2 == 1 {
			mode = "stay"
		}
		s.create(podSpec{
			namespace: ns, name: fmt.Sprint("p", next), account: fmt.Sprint("app", next%2), node: 1, args: []string{"heir", reuseDir, mode},
			labels: map[string]string{"mode": mode}, edit: heirs,
		})
		next++
	}
	for range reuseActive {
		create()
	}
	over, deleted := map[string]bool{}, map[string]bool{}
	for e := range w.ResultChan() {
		p, ok := e.Object.(*corev1.Pod)
		if !ok {
			s.Fatalf("watch: %+v", e.Object)
		}
		if p.Labels["mode"] == "stay" && running(p) && !deleted[p.Name] {
			deleted[p.Name] = true
			s.must(s.kube.CoreV1().Pods(ns).Delete(s.ctx, p.Name, metav1.DeleteOptions{}))
		}
		if (e.Type == watch.Deleted || ended(p)) && !over[p.Name] {
			if ended(p) && p.Status.ContainerStatuses[0].State.Terminated.ExitCode != 0 && p.Labels["mode"] == "exit" {
				s.Errorf("pod %s failed: %s", p.Name, describe(p))
			}
			over[p.Name] = true
			if len(over) == pods {
				return
			}
			create()
		}
	}
	s.Fatalf("%d of %d pods have ended in time", len(over), pods)
}

// heirs gives a pod what it needs to inherit and to bequeath.
func heirs(p *corev1.Pod) {
	kind, grace := corev1.HostPathDirectory, int64(20)
	p.Spec.TerminationGracePeriodSeconds = &grace // it ends when it has asked
	p.Spec.Volumes = []corev1.Volume{{Name: "heirs", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: reuseDir, Type: &kind}}}}
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "heirs", MountPath: reuseDir}}
	p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}}}
}

// confine leaves a node's CNI these addresses alone, until the test ends. It tries them in a namespace that it makes.
func (s *scenario) confine(ns string, node int, to netip.Prefix) {
	s.Helper()
	const file = "/etc/cni/net.d/10-pods.conflist"
	old := s.onNode(node, "cat", file)
	all := fmt.Sprintf(`"subnet":"10.244.%d.0/24"`, node)
	if !strings.Contains(old, all+"}") {
		s.Fatalf("node %d has another network: %s", node, old)
	}
	ip := to.Masked().Addr().As4()
	part := fmt.Sprintf(`%s,"rangeStart":"10.244.%d.%d","rangeEnd":"10.244.%d.%d"`, all, node, ip[3]+1, node, ip[3]+14)
	set := func(text string) {
		s.onNode(node, "sh", "-c", `printf %s "$1" >`+file+`.new && mv `+file+`.new `+file, "-", text)
	}
	s.Cleanup(func() { set(old) })
	set(strings.Replace(old, all, part, 1))
	// containerd reads it when it is told of the change. Until then pods get other addresses.
	s.newNamespace(ns, nil)
	s.serviceAccount(ns, "app", "")
	for i := range 20 {
		name := fmt.Sprint("p", i)
		s.create(podSpec{namespace: ns, name: name, account: "app", node: node, args: []string{"once"}})
		p := s.waitPod(ns, name, func(p *corev1.Pod) bool { return ended(p) && p.Status.PodIP != "" })
		if ip, err := netip.ParseAddr(p.Status.PodIP); err == nil && to.Contains(ip) {
			return
		}
	}
	s.Fatalf("node %d goes on giving other addresses than %s", node, to)
}
