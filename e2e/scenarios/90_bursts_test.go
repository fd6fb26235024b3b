package scenarios

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// Five hundred short-lived pods in bursts of 30 and 80, each of which asks once. None ever gets what is not its own. A refusal is
// no failure here: nobody knows a pod's IP before its kubelet has told the API server.
func TestScenarioBursts(t *testing.T) {
	s := beginScenario(t, 5*time.Minute)
	s.install()
	const ns = "bursts"
	roles := []string{s.role("bursts/red"), s.role("bursts/green"), s.role("bursts/blue")}
	s.newNamespace(ns, allowed(roles...))
	for i, role := range roles {
		s.serviceAccount(ns, fmt.Sprint("app", i), role)
	}
	type outcome struct {
		r    sequence.Result
		size int
	}
	var all []outcome
	for burst, size := range []int{30, 80, 30, 80, 30, 80, 30, 80, 30, 30} {
		label := fmt.Sprintf("burst=%d", burst)
		accounts := map[string]int{}
		for i := range size {
			name := fmt.Sprintf("b%d-%d", burst, i)
			accounts[name] = i % len(roles)
			s.create(podSpec{namespace: ns, name: name, account: fmt.Sprint("app", i%len(roles)), args: []string{"once"},
				labels: map[string]string{"burst": fmt.Sprint(burst)}})
		}
		answers := map[string]sequence.Result{}
		s.must(s.eachPod(ns, label, func(p *corev1.Pod) bool {
			if _, known := answers[p.Name]; !known && ended(p) {
				r, err := answer(p)
				s.must(err)
				answers[p.Name] = r
			}
			return len(answers) == size
		}))
		for name, r := range answers {
			if r.Kind == sequence.OK {
				s.holds(r, roles[accounts[name]])
			}
			all = append(all, outcome{r, size})
		}
		zero := int64(0)
		s.must(s.kube.CoreV1().Pods(ns).DeleteCollection(s.ctx, metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{LabelSelector: label}))
	}
	for _, size := range []int{30, 80} {
		n, kinds, took := 0, map[string]int{}, []time.Duration{}
		for _, o := range all {
			if o.size == size {
				n++
				kind := o.r.Kind
				if o.r.Code != 0 {
					kind = fmt.Sprintf("%s %d at %s", kind, o.r.Code, o.r.Step)
				}
				kinds[kind]++
				if o.r.Kind == sequence.Cut {
					t.Errorf("a connection was cut: %s", o.r.Brief())
				}
				took = append(took, o.r.Took)
			}
		}
		slices.Sort(took)
		s.figures("bursts of %d: %d pods, %v, none wrong; p50 %s p90 %s max %s", size, n, kinds, round(took[n/2]), round(took[n*9/10]), round(took[n-1]))
	}
	if len(all) != 500 {
		t.Errorf("%d pods instead of 500", len(all))
	}
}

// eachPod hands over every state of the selection's pods until done.
func (s *scenario) eachPod(ns, labels string, done func(*corev1.Pod) bool) error {
	ctx, cancel := context.WithTimeout(s.ctx, 2*time.Minute)
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
