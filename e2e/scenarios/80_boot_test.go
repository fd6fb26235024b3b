package scenarios

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

const taintKey = "imdsgate.dev/not-ready"

// A node joins, and boots after power cuts, while pods wait for it that ask from their first instruction. A new Node registers with
// the startup taint: no pod gets there before the daemon has taken the taint away. A boot of the same Node does not bring the taint
// back, and the kubelet starts its pods at once: with the guard's lines in the boot nothing reaches the endpoint, and without them
// nothing from the moment when the daemon has put the guard in.
func TestScenarioBoot(t *testing.T) {
	s := beginScenario(t, 5*time.Minute)
	s.install(`startupTaint="` + taintKey + `"`)
	const ns, node, pods = "boot", 3, 5
	role := s.role("boot/app")
	s.newNamespace(ns, allowed(role))
	s.serviceAccount(ns, "app", role)
	name := func(i int) string { return fmt.Sprint("p", i) }
	for i := range pods {
		s.create(podSpec{namespace: ns, name: name(i), account: "app", node: node, args: []string{"watch"}, restart: corev1.RestartPolicyAlways})
	}
	dir := filepath.Join(s.dir, nodeName(node))
	t.Cleanup(func() {
		_, err := cluster(s.ctx, nil, "node-down", strconv.Itoa(node))
		if err != nil {
			t.Error(err)
		}
		if err := s.kube.CoreV1().Nodes().Delete(s.ctx, nodeName(node), metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})

	untainted := make(chan uint64, 1)
	go func() { untainted <- s.untainted(nodeName(node)) }()
	images := "IMAGES=" + strings.Join([]string{filepath.Join(s.images, "pause.tar"), s.image, s.probe}, " ")
	_, err := cluster(s.ctx, []string{images, "TAINTS=" + taintKey + "=:NoSchedule"}, "node-up", strconv.Itoa(node))
	s.must(err)
	scheduled := make([]uint64, pods)
	for i := range pods {
		p := s.waitPod(ns, name(i), func(p *corev1.Pod) bool { return p.Spec.NodeName != "" })
		scheduled[i] = version(p.ResourceVersion)
	}
	removed := <-untainted
	if removed == 0 {
		t.Fatal("the node was never seen with its taint and then without")
	}
	for i, v := range scheduled {
		if v < removed {
			t.Errorf("pod %d was scheduled before the taint was gone", i)
		}
	}
	first := map[string]map[string]int{}
	served := func(what string, restarts int32) {
		t.Helper()
		first[what] = map[string]int{}
		for i := range pods {
			s.waitPod(ns, name(i), func(p *corev1.Pod) bool {
				return running(p) && p.Status.ContainerStatuses[0].RestartCount >= restarts
			})
			s.askUntil(ns, name(i), what, func(r sequence.Result) bool {
				return r.Kind == sequence.OK && s.owner(r.AccessKeyID).RoleARN == role
			})
			line, _, _ := strings.Cut(s.kubectl("-n", ns, "logs", name(i)), ",")
			first[what][strings.Trim(strings.TrimPrefix(line, `{"Kind":`), `"`)]++
		}
	}
	served("new", 0)
	if n := first["new"][sequence.OK]; n != pods {
		t.Errorf("on the new node %d of %d pods were not served at once: %v", pods-n, pods, first["new"])
	}
	s.sealed()

	boot := func() {
		t.Helper()
		for _, power := range []string{"node-down", "node-up"} {
			_, err := cluster(s.ctx, nil, power, strconv.Itoa(node))
			s.must(err)
		}
	}
	s.must(os.WriteFile(filepath.Join(dir, "boot"), []byte(bootScript(t)), 0o755))
	boot()
	served("guard at boot", 1)
	s.sealed()

	// The daemon is late, so that pods do get what is the node's before.
	s.helm("uninstall", release)
	s.gone()
	s.sealed()
	s.must(os.Remove(filepath.Join(dir, "boot")))
	boot()
	for i := range pods {
		s.waitPod(ns, name(i), func(p *corev1.Pod) bool { return running(p) && p.Status.ContainerStatuses[0].RestartCount >= 2 })
		s.askUntil(ns, name(i), "open", func(r sequence.Result) bool {
			return r.Kind == sequence.OK && s.owner(r.AccessKeyID).NodeIndex == node
		})
	}
	early := len(s.reached())
	s.upgrade()
	for !strings.Contains(s.onNode(node, "ip", "-4", "rule"), "unreachable") {
	}
	s.breach()
	s.rolledOut()
	served("unguarded boot", 2)
	s.sealed()
	s.figures("new Node with the startup taint: %d of %d pods served by their first answer, scheduled after the taint was gone; first answers with the guard at boot: %v, nothing reached the endpoint; without both and with a late daemon: pods had the node's credentials (%d requests and flows), and nothing reached the endpoint once the guard was in",
		first["new"][sequence.OK], pods, first["guard at boot"], early)
}

// untainted returns the version of the Node at which it lost the taint that it had.
func (s *scenario) untainted(node string) uint64 {
	had := false
	for s.ctx.Err() == nil {
		w, err := s.kube.CoreV1().Nodes().Watch(s.ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + node})
		if err != nil {
			return 0
		}
		for e := range w.ResultChan() {
			n, ok := e.Object.(*corev1.Node)
			if !ok {
				break
			}
			has := false
			for _, taint := range n.Spec.Taints {
				has = has || taint.Key == taintKey
			}
			if had && !has {
				w.Stop()
				return version(n.ResourceVersion)
			}
			had = had || has
		}
		w.Stop()
	}
	return 0
}

// version orders changes of all objects: every one is a revision of etcd.
func version(resourceVersion string) uint64 {
	v, _ := strconv.ParseUint(resourceVersion, 10, 64)
	return v
}

// bootScript is what systemd makes of the unit that is shipped.
func bootScript(t *testing.T) string {
	t.Helper()
	unit, err := os.ReadFile("../../deploy/imdsgate-guard.service")
	if err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh -e\n"
	for line := range strings.Lines(string(unit)) {
		command, ok := strings.CutPrefix(strings.TrimSpace(line), "ExecStart=")
		if !ok {
			continue
		}
		if may, ok := strings.CutPrefix(command, "-"); ok {
			command = may + " || true"
		}
		script += command + "\n"
	}
	return script
}
