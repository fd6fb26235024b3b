package proxy

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// maxFix bounds a fix, in bytes. A longer one is left out: a command that is cut is worse than none.
const maxFix = 700

// bound keeps a refusal printable and within maxText bytes.
func (r *Refusal) bound() {
	if len(r.Fix) > maxFix {
		r.Fix = ""
	}
	r.Fix = oneLine(r.Fix)
	r.Text = oneLineOf(r.Text, maxText-len(withFix("", r.Fix)))
}

// annotateCommand is a command to paste that sets an annotation: of kind namespace, or of another with its namespace. The
// value may be what the author of a pod wrote, and whoever pastes it may do much: what could mean more to a shell than itself
// is not put into a command, which is empty then.
func annotateCommand(kind, namespace, name, annotation, value string, overwrite bool) string {
	object := kind + " " + name
	if kind != "namespace" {
		object = kind + " -n " + namespace + " " + name
	}
	if !only(name, isObjectNameByte) || !only(namespace, isObjectNameByte) || !only(value, isQuotableByte) || value == "" {
		return ""
	}
	if kind == "namespace" || !only(value, isExternalIDByte) {
		value = "'" + value + "'"
	}
	command := fmt.Sprintf("kubectl annotate %s %s=%s", object, annotation, value)
	if overwrite {
		command += " --overwrite"
	}
	return command
}

// isQuotableByte is of what single quotes keep from a POSIX shell, and a terminal shows as it is.
func isQuotableByte(c byte) bool { return (isGraphic(c) || c == ' ') && c != '\'' }

func isObjectNameByte(c byte) bool { return isLowerDigitDash(c) || c == '.' }

// correct is how to set the annotation right.
func (a annotation) correct(s Subject, value string) string {
	if a.onAccount {
		return annotateCommand("serviceaccount", s.Pod.Namespace, s.Pod.ServiceAccount, a.name, value, a.value != "")
	}
	return "correct it in the template that the pod is made of"
}

// exampleRole is a role's ARN to be completed by who reads it.
func (p *Policy) exampleRole() string {
	if p.BaseRoleARN != "" && only(p.BaseRoleARN, isExternalIDByte) {
		return complete(p.BaseRoleARN, "ROLE")
	}
	return "arn:aws:iam::ACCOUNT:role/ROLE"
}

// noRole refuses a pod that nothing names a role for. The commonest mistake is an annotation in the wrong place.
func (p *Policy) noRole(s Subject, a annotated) *Refusal {
	r := &Refusal{Kind: NoRole, Event: EventNoRole, Text: a.role.on + " has no " + AnnotationRoleARN + " annotation"}
	if s.ServiceAccountAbsent {
		r.Text = a.role.on + " does not exist, so it has no " + AnnotationRoleARN + " annotation"
	}
	role := p.exampleRole()
	for _, name := range []string{AnnotationRoleARN, AnnotationPodRole} {
		value := s.PodAnnotations[name]
		if value == "" {
			continue
		}
		r.Misplaced = true
		text := "; annotation %s of pod %s/%s has no effect, it belongs on the service account"
		if name == AnnotationPodRole {
			text = "; annotation %s of pod %s/%s counts with -pod-annotations alone"
		}
		r.Text += fmt.Sprintf(text, name, s.Pod.Namespace, s.Pod.Name)
		if arn, err := completeRole(p.BaseRoleARN, value); err == nil {
			role = arn.String()
		}
		break
	}
	if p.PodAnnotations {
		r.Text += ", and pod " + s.Pod.Namespace + "/" + s.Pod.Name + " has no " + AnnotationPodRole + " annotation"
	}
	_, empty := s.ServiceAccountAnnotations[AnnotationRoleARN] // kubectl overwrites nothing unasked, not even an empty value
	r.Fix = annotateCommand("serviceaccount", s.Pod.Namespace, s.Pod.ServiceAccount, AnnotationRoleARN, role, empty)
	return r
}

// permit is what to do so that the namespace permits the role beside those that it permits now: a command where one can be
// pasted safely.
func (p *Policy) permit(s Subject, role string) string {
	n := s.Namespace
	if n == nil {
		return ""
	}
	type change struct {
		annotation, value string
		there             bool // already
	}
	var changes []change
	glob := func() change {
		list := []string{role}
		if n.unreadable == nil {
			list = slices.Concat(n.globs, list)
		}
		value, err := json.Marshal(list)
		if err != nil || strings.Contains(string(value), `\`) {
			value = nil
		}
		return change{AnnotationAllowedRoles, string(value), n.hasGlobs}
	}
	expression := func() change {
		value := regexp.QuoteMeta(role)
		if n.pattern != nil {
			value = n.expression + "|" + value
		}
		return change{AnnotationPermitted, value, n.hasRegexp}
	}
	switch {
	case n.hasGlobs || n.hasRegexp:
		if n.hasGlobs && !slices.ContainsFunc(n.globs, func(glob string) bool { return match(glob, role) }) {
			changes = append(changes, glob())
		}
		if n.hasRegexp && (n.pattern == nil || !n.pattern.MatchString(role)) {
			changes = append(changes, expression())
		}
	case p.NamespacePolicy == NamespacePolicyRegexp:
		changes = []change{expression()}
	default:
		changes = []change{glob()}
	}
	var commands, names []string
	for _, c := range changes {
		names = append(names, c.annotation)
		if only(role, isExternalIDByte) { // else it would mean more in a pattern, or to a shell, than itself
			if command := annotateCommand("namespace", s.Pod.Namespace, s.Pod.Namespace, c.annotation, c.value, c.there); command != "" {
				commands = append(commands, command)
			}
		}
	}
	if command := strings.Join(commands, " && "); len(commands) == len(changes) && len(command) <= maxFix {
		return command
	}
	return "let annotation " + strings.Join(names, " and ") + " of namespace " + s.Pod.Namespace + " permit the role"
}

// FixAmbiguousIP is what to do about two running pods with one IP.
const FixAmbiguousIP = "delete one of the pods that have this IP; if it happens again, the network plugin gives addresses twice"
